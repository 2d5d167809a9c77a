"""Captions as metadata of the photos themselves: XMP's dc:description, in a sidecar or inside the photo.

Exiv2 reads and writes the XMP packets, which may hold much else; what it made of one is only taken if all of that is
still there.
"""

import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from captioner.errors import InputError
from captioner.output.xmp_in_pictures import Unsuitable, packet_of, with_packet
from captioner.runtime.files import atomic_write, read_small, require_replaceable, rewrite

log = logging.getLogger(__name__)

Place = Literal["xmp", "embed"]  # beside the photo, or in it
Existing = Literal["keep", "replace"]

_DESCRIPTION, _DEFAULT = "Xmp.dc.description", 'lang="x-default"'
_IPTC_CAPTION = "Iptc.Application2.Caption"  # where older programs keep it
_EMPTY_PACKET = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""/></rdf:RDF>'
    b'</x:xmpmeta>\n<?xpacket end="w"?>'
)


def exiv2() -> ModuleType:
    """The library that reads and writes metadata.

    Raises:
        InputError: it is not installed, or not usable on this system.
    """
    try:
        import pyexiv2
    except (ImportError, OSError) as error:
        raise InputError(
            f"--write_metadata needs the package pyexiv2 ({error})", remedy='pip install "captioner[metadata]"'
        ) from error
    pyexiv2.set_log_level(4)  # its lines go to stderr, and know no file names
    return pyexiv2


class PhotoMetadata:
    """photo.jpg → its description, in photo.jpg.xmp or in the photo.

    photo.xmp is left alone: beside a raw file it belongs to that one.

    Args:
        place: "embed" writes into JPEG, PNG and WebP files, and beside all others.
        existing: what becomes of a description that is there: it is kept, or replaced.

    Raises:
        InputError: the library is missing.
    """

    def __init__(self, place: Place, existing: Existing = "keep") -> None:
        self.place, self.existing = place, existing
        self._exiv2 = exiv2()

    def sidecar_of(self, photo: Path) -> Path:
        """The XMP file of a photo."""
        return photo.with_name(photo.name + ".xmp")

    def is_captioned(self, photo: Path) -> bool:
        """Whether the photo has a description, where one would be written."""
        places = [self.sidecar_of(photo)]
        if self.place == "embed":
            places.append(photo)
        return any(self._has_description(path) for path in places)

    def write(self, photo: Path, caption: str) -> None:
        """Write the caption of a photo. What stays as it is, because there is a description or for its own sake, is
        logged.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        if not caption:
            return
        if self.place == "embed":
            try:
                rewrite(photo, lambda content: self._described(photo, content, caption))
                return
            except (Unsuitable, InputError) as reason:
                log.warning("%s: its caption goes into %s: %s", photo, self.sidecar_of(photo).name, reason)
        self._write_sidecar(photo, caption)

    def _write_sidecar(self, photo: Path, caption: str) -> None:
        path = self.sidecar_of(photo)
        try:
            before = read_small(path) if os.path.lexists(path) else _EMPTY_PACKET
            after = self._described(path, before, caption)
            if after is None:
                return
            require_replaceable(path)
        except (Unsuitable, OSError, InputError) as reason:
            log.warning("kept %s: %s", path, reason)
            return
        with atomic_write(path) as stream:
            stream.write(after)

    def _described(self, path: Path, content: bytes, caption: str) -> bytes | None:
        """The content of a file with the caption as its description; None: it stays as it is.

        Raises:
            Unsuitable: it cannot be done without harm.
        """
        is_sidecar = path == self.sidecar_of(path.with_name(path.stem))
        packet = content if is_sidecar else packet_of(content) or _EMPTY_PACKET
        before = self._xmp(packet)
        there = before.get(_DESCRIPTION, {})
        there = there if isinstance(there, dict) else {_DEFAULT: there}
        if there.get(_DEFAULT) == caption:
            return None
        described = any(text.strip() for text in there.values()) or (not is_sidecar and self._has_description(path))
        if self.existing == "keep" and described:
            log.warning("kept the description of %s (--overwrite 1 replaces it)", path)
            return None
        wanted = {**before, _DESCRIPTION: {**there, _DEFAULT: caption}}
        try:
            image = self._exiv2.ImageData(packet)
            try:
                image.modify_xmp({_DESCRIPTION: wanted[_DESCRIPTION]})
                after: bytes = image.get_bytes()
            finally:
                image.close()
        except (RuntimeError, ValueError) as error:
            raise Unsuitable(f"Exiv2 cannot write it ({error})") from error
        if self._xmp(after) != wanted:
            raise Unsuitable("other metadata would change")
        return after if is_sidecar else with_packet(content, after)

    def _xmp(self, packet: bytes) -> dict[str, Any]:
        try:
            image = self._exiv2.ImageData(packet)
            try:
                return dict(image.read_xmp())
            finally:
                image.close()
        except (RuntimeError, ValueError) as error:
            raise Unsuitable(f"its XMP cannot be read ({error})") from error

    def _has_description(self, path: Path) -> bool:
        if not os.path.isfile(path):  # Path.is_file fails for names that are too long
            return False
        try:
            image = self._exiv2.Image(str(path))  # reads no more than it has to
            try:
                texts = [image.read_xmp().get(_DESCRIPTION, "")]
                if path.suffix != ".xmp":
                    texts.append(image.read_iptc(encoding="latin-1").get(_IPTC_CAPTION, ""))
            finally:
                image.close()
        except (RuntimeError, ValueError):  # no picture, no metadata: there is no description
            return False
        return any(str(text).strip() for one in texts for text in (one.values() if isinstance(one, dict) else [one]))
