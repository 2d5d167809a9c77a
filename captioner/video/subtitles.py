"""Captions with times, and the files that hold them: SubRip, WebVTT, JSON lines."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from captioner.inference.caption import Caption
from captioner.output.rows import caption_row
from captioner.runtime.files import atomic_write


@dataclass
class Subtitle:
    """What is to be read from `begin` to `end` (seconds)."""

    begin: float
    end: float
    caption: Caption


def joined(subtitles: Iterable[Subtitle]) -> list[Subtitle]:
    """Without the breaks between neighbours of the same text, and without those that nobody could see."""
    kept: list[Subtitle] = []
    for one in subtitles:
        if one.end <= one.begin:
            continue
        if kept and kept[-1].caption.text == one.caption.text and kept[-1].end == one.begin:
            kept[-1].end = one.end
        else:
            kept.append(Subtitle(one.begin, one.end, one.caption))
    return kept


class Texts:
    """What is to be read at a time, for times that rise."""

    def __init__(self, subtitles: Sequence[Subtitle]) -> None:
        self._left = list(reversed(subtitles))

    def at(self, time: float) -> str:
        """The text at `time` seconds; "" where there is none."""
        while self._left and self._left[-1].end <= time:
            self._left.pop()
        return self._left[-1].caption.text if self._left and self._left[-1].begin <= time else ""


def write_srt(path: Path, subtitles: Sequence[Subtitle]) -> None:
    """SubRip. Captions that are withheld leave a gap.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_write(path, "w", encoding="utf-8") as stream:
        for number, one in enumerate((one for one in subtitles if one.caption.text), start=1):
            stream.write(f"{number}\n{clock(one.begin, ',')} --> {clock(one.end, ',')}\n{one.caption.text}\n\n")


def write_vtt(path: Path, subtitles: Sequence[Subtitle]) -> None:
    """WebVTT.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_write(path, "w", encoding="utf-8") as stream:
        stream.write("WEBVTT\n")
        for one in subtitles:
            text = one.caption.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            if text:
                stream.write(f"\n{clock(one.begin)} --> {clock(one.end)}\n{text}\n")


def write_jsonl(path: Path, subtitles: Sequence[Subtitle]) -> None:
    """One JSON object a line: begin and end in seconds, and what caption-eval writes about a picture.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_write(path, "w", encoding="utf-8") as stream:
        for one in subtitles:
            row = {
                key: value for key, value in caption_row(one.caption).items() if key not in ("image_id", "file_name")
            }
            times = {"begin": round(one.begin, 3), "end": round(one.end, 3)}
            stream.write(json.dumps(times | row, ensure_ascii=False) + "\n")


def clock(seconds: float, separator: str = ".") -> str:
    """ "01:02:03.450" """
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{separator}{rest % 1000:03}"
