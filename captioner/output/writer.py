"""Everything that happens to the captions of a run: stdout, journal, page, text files, result file, scores."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from captioner.errors import InputError, printable
from captioner.inference.caption import Caption
from captioner.metrics import METRICS, score
from captioner.metrics.diversity import diversity
from captioner.metrics.pairing import Prediction, Reference, join
from captioner.metrics.report import as_json
from captioner.metrics.significance import NUM_BOOTSTRAP, bootstrap_intervals
from captioner.output.album import require_album, write_album
from captioner.output.page import VisWriter, fixed_names, sole_writer
from captioner.output.results import Journal, require_known_suffix, write_results
from captioner.output.rows import CaptionRow, caption_row
from captioner.runtime.files import atomic_write, require_writable_folder
from captioner.runtime.locks import sole_run
from captioner.runtime.outputs import require_output
from captioner.runtime.quantities import bytes_text

if TYPE_CHECKING:
    from captioner.inference.run import Totals
    from captioner.inference.sources import Source

ACCURACY = "next word: top-1 accuracy {:.4f}, top-5 {:.4f}"
BOOTSTRAP_SEED = 123  # that of caption-score

log = logging.getLogger(__name__)


class PhotoCaptions(Protocol):
    """Captions kept with their photos: text files, metadata."""

    def is_captioned(self, photo: Path) -> bool: ...

    def write(self, photo: Path, caption: str) -> None: ...


@dataclass(frozen=True)
class Destinations:
    """Where captions go besides stdout; None: not there.

    Attributes:
        output: a file of results; its suffix says the format.
        page: the page's folder.
        copy_pictures: whether the page gets the pictures.
        album: the page as one file; needs `page` and its pictures.
        about: what the page says about the run: "title", "model", "image_mode".
        with_photos: text files beside the photos, metadata in them.
        rows_to_stdout: print rows, as JSON lines, instead of lines to read.
        overwrite: whether files that are not ours may be replaced on the page.
    """

    output: Path | None = None
    page: Path | None = None
    copy_pictures: bool = True
    album: Path | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    with_photos: Sequence[PhotoCaptions] = ()
    rows_to_stdout: bool = False
    overwrite: bool = False


class CaptionWriter:
    """Takes the captions of a run batch by batch, in order.

    Args:
        source: where the pictures are, for the page and for text files.
        run: what makes this run the same as an earlier one: model, options, list of images.
        resume: go on with that run's journal.
        references: known captions to score against; None: no scores.
        name: of this evaluation; with `references` its scores are kept in scores_NAME.json beside the results.

    Raises:
        InputError: something cannot be written, or the journal belongs to a different run.
    """

    def __init__(
        self,
        source: "Source",
        destinations: Destinations,
        *,
        run: str,
        resume: bool,
        references: Sequence[Reference] | None,
        name: str = "",
    ) -> None:
        self.source, self.to, self.references = source, destinations, references
        if self.to.output:
            require_known_suffix(self.to.output)
        if self.to.album:
            require_album(self.to.album, len(source))
        self.scores_file = self._place_of_scores(name) if references is not None else None
        self._require_places_of_their_own()
        with contextlib.ExitStack() as held:
            journal_path = None
            if self.to.page:
                held.enter_context(sole_writer(self.to.page))
                journal_path = self.to.page / "vis.journal"
            if self.to.output:
                folder, name = require_writable_folder(self.to.output.parent, "results"), self.to.output.name
                journal_path = folder / f"{name}.journal"
                held.enter_context(sole_run(folder / f".{name}.lock", str(self.to.output)))
            self.page = VisWriter(self.to.page, self.to.overwrite) if self.to.page else None
            self.journal = Journal(journal_path, run, resume) if journal_path else None
            self._held = held.pop_all()
        self.num_done = self.journal.num_done if self.journal else 0
        self.totals = self.journal.totals if self.journal else {}
        if self.num_done:
            log.info("going on after %d of %d images", self.num_done, max(self.num_done, len(source)))
        self.to_score: list[CaptionRow] = list(self.journal.rows()) if self.journal and references else []

    def _place_of_scores(self, name: str) -> Path | None:
        beside = self.to.output.parent if self.to.output else self.to.page
        if beside is None:
            return None
        path = beside / f"scores_{name}.json"
        require_output(path, ["scores"])
        return path

    def _require_places_of_their_own(self) -> None:
        """Refuse results that the page would write over, or that would write over the page."""
        if self.to.page:
            page = {os.path.realpath(self.to.page / name): name for name in fixed_names()}
            for path in (self.to.output, self.to.album, self.scores_file):
                name = page.get(os.path.realpath(path)) if path else None
                if name and name != "vis.json":  # which holds the same
                    raise InputError(f"{path}: is a file of the page itself", remedy="choose another name")

    def __enter__(self) -> "CaptionWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.journal:
            self.journal.close()
        self._held.close()

    def add(
        self,
        positions: Sequence[int],
        captions: Sequence[Caption],
        skipped: Sequence[tuple[str, str]] = (),
        modified: Sequence[float] = (),
        totals: Mapping[str, float] | None = None,
    ) -> None:
        """Take the captions of a batch.

        Args:
            positions: of each captioned image within the run.
            captions: of these images.
            skipped: files that could not be read: name, reason.
            modified: when the images' files were last changed, if that is to be kept.
            totals: what the run adds up to with this batch, for the one that may have to go on.
        """
        for name, reason in skipped:
            log.warning("skipped %s", reason if name in reason else f"{name}: {reason}")
        rows = list(map(caption_row, captions))
        for row, time in zip(rows, modified, strict=False):
            row["modified"] = time
        if self.page and self.to.copy_pictures:
            pictures = [self.source.picture(position) for position in positions]
            added = self.page.add_pictures(list(zip((row["image_id"] for row in rows), pictures, strict=True)))
            for row, picture in zip(rows, added, strict=True):
                row.update(picture)
        for position, row in zip(positions, rows, strict=True):
            for place in self.to.with_photos:
                photo = self.source.picture(position)
                assert isinstance(photo, Path)
                place.write(photo, row["caption"])
            line = f"image {row['image_id']}: {row['caption']}  ({row['file_name']})"
            with tqdm.external_write_mode():  # above the progress bar, if there is one
                print(json.dumps(row, ensure_ascii=False) if self.to.rows_to_stdout else printable(line), flush=True)
        self.num_done += len(positions) + len(skipped)
        if self.references:
            self.to_score += rows
        if self.journal:
            self.journal.append(rows, self.num_done, totals)

    def finish(self, totals: "Totals") -> None:
        """Write the result file and the page, and report loss and scores.

        Raises:
            InputError: not a single picture could be read.
        """
        if self.num_done and not totals.num_captioned and totals.num_skipped == self.num_done:
            if self.journal:
                self.journal.remove()  # there is nothing to go on from
            raise InputError(f"none of the {self.num_done} pictures could be read", remedy="see the lines above")
        scores = self._score(self.references) if self.references else {}
        if self.journal:
            self._write(self.journal.rows, scores)
            if self.to.output:
                log.info("results: %s", self.to.output)
            if self.to.page:
                log.info("page: %s (open it by double click)", self.to.page / "index.html")
                if self.to.album:
                    size = write_album(self.to.page, self.to.album)
                    log.info("album: %s, %s", self.to.album, bytes_text(size))
            self.journal.remove()
        skipped = f", {totals.num_skipped} skipped" if totals.num_skipped else ""
        log.info("%d images captioned%s", totals.num_captioned, skipped)
        measured = [] if totals.loss is None else [f"loss: {totals.loss:.6f}", ACCURACY.format(*totals.accuracy)]
        measured += ["  ".join(f"{name} {value:.4f}" for name, value in scores.items())] if scores else []
        for line in measured:
            if self.to.rows_to_stdout:
                log.info("%s", line)  # stdout has rows, and nothing else
            else:
                print(line, flush=True)
        if scores and self.scores_file:
            log.info("scores: %s", self.scores_file)

    def publish(self) -> None:
        """Write the result file and the page as far as they have come; a file's last caption counts.

        Raises:
            InputError: a file cannot be written.
        """
        assert self.journal
        journal = self.journal
        last = {row["file_name"]: row["image_id"] for row in journal.rows()}
        self._write(lambda: (row for row in journal.rows() if last[row["file_name"]] == row["image_id"]), {})

    def _write(self, rows: Callable[[], Iterable[CaptionRow]], scores: Mapping[str, float]) -> None:
        if self.to.output:
            write_results(self.to.output, rows())
        if self.page:
            about = {**self.to.about, "date": datetime.now().astimezone().isoformat(timespec="seconds")}
            self.page.finish(rows(), scores, about | {"pictures": self.to.copy_pictures})

    def _score(self, references: Sequence[Reference]) -> dict[str, float]:
        """coco-caption's scores of what was captioned, as far as they can be computed here; images without known
        captions are left out."""
        predictions = [Prediction(row["image_id"], row["file_name"], row["caption"], "") for row in self.to_score]
        joined = join(predictions, references)
        if joined.unmatched_predictions:
            log.info("%d images have no known captions and are not scored", len(joined.unmatched_predictions))
        said, known = [one.caption for one, _ in joined.pairs], [one.captions for _, one in joined.pairs]
        scores = score(said, known, metrics=METRICS)
        if scores.skipped:
            log.warning("%s", scores.skipped_line)
        if self.scores_file:
            intervals = bootstrap_intervals(scores.measures, num_samples=NUM_BOOTSTRAP, seed=BOOTSTRAP_SEED)
            described = as_json(joined, scores, intervals, diversity(scores.tokenised, None))
            with atomic_write(self.scores_file, "w", encoding="utf-8") as stream:
                json.dump(described, stream, ensure_ascii=False, indent=1)
        return scores.corpus
