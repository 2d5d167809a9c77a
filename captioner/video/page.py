"""The page of a video: one picture a scene, linked to its time."""

import dataclasses
import os
from pathlib import Path
from urllib.parse import quote

from captioner.output.page import VisWriter
from captioner.output.rows import caption_row
from captioner.video.scenes import Scene
from captioner.video.subtitles import clock


class ScenePage:
    """Fills the page's folder scene by scene.

    Args:
        overwrite: whether files that are not ours may be replaced.

    Raises:
        InputError: the folder cannot be written, or has files of others where ours go.
    """

    def __init__(self, folder: str | Path, video: Path, overwrite: bool = False) -> None:
        self._writer = VisWriter(folder, overwrite)
        self._video = video
        self._rows: list[dict[str, object]] = []

    def add(self, scene: Scene) -> None:
        """Add a scene: its picture now, its row at the end."""
        number = len(self._rows) + 1
        (picture,) = self._writer.add_pictures([(number, scene.picture.transpose(2, 0, 1))])
        name = f"{self._video.name} at {clock(scene.begin)}"
        caption = dataclasses.replace(scene.caption, image_id=number, file_name=name)
        # Media fragments (W3C): browsers begin to play there.
        address = quote(Path(os.path.relpath(self._video.resolve(), self._writer.folder.resolve())).as_posix())
        times = {"begin": round(scene.begin, 3), "end": round(scene.end, 3)}
        link = {"link": f"{address}#t={scene.begin:.3f}"}
        self._rows.append({**caption_row(caption), **picture, **times, **link})

    def finish(self) -> Path:
        """Write the page; returns the path of its index.html."""
        return self._writer.finish(self._rows)
