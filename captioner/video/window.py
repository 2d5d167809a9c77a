"""A window that shows pictures. Python's own tkinter: OpenCV would bring a second copy of ffmpeg along."""

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from captioner.errors import InputError


class Window:
    """Closed by its button, by q or by Escape; `closed` then is true.

    Raises:
        InputError: there is no display, or Python came without tkinter.
    """

    def __init__(self, title: str) -> None:
        try:
            import tkinter
        except ImportError as error:
            raise InputError(
                "--show 1: this Python has no tkinter", remedy="install it (Debian: python3-tk), or use --output"
            ) from error
        from PIL import ImageTk

        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise InputError(f"--show 1: no window can be opened ({error})", remedy="use --output instead") from error
        self._photo_image = ImageTk.PhotoImage
        self._root.title(title)
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack()
        self.closed = False
        self._root.protocol("WM_DELETE_WINDOW", self._on_close)
        for key in ("q", "<Escape>"):
            self._root.bind(key, self._on_close)

    def _on_close(self, *_: object) -> None:
        self.closed = True

    def show(self, pixels: np.ndarray) -> None:
        """Show uint8 RGB (height, width, 3)."""
        picture = self._photo_image(Image.fromarray(pixels))
        self._label.configure(image=picture)
        self._label.image = picture  # type: ignore[attr-defined]  # Tk does not keep it
        self._root.update()

    def close(self) -> None:
        self._root.destroy()


@contextlib.contextmanager
def window(title: str, wanted: bool) -> Iterator[Window | None]:
    """A window while the block runs, or None where none is wanted."""
    if not wanted:
        yield None
        return
    one = Window(title)
    try:
        yield one
    finally:
        one.close()
