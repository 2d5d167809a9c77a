"""Captions by function call: what `import captioner` offers, and what caption-eval and caption-score stand on."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import torch

from captioner.data.batch import Batch
from captioner.data.batches import shares
from captioner.data.image_like import ImageLike, as_list, is_image_like
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.caption import Caption, Likelihood
from captioner.inference.likelihood import judge, likelihoods
from captioner.inference.load import load_models, make_captioner
from captioner.inference.run import Evaluated, captions_of, evaluate
from captioner.inference.search_keywords import SearchKeywords, search_options_of
from captioner.inference.sources import ImageList, Images, open_folder
from captioner.model.checkpoint import Checkpoint
from captioner.runtime.device import device_named
from captioner.runtime.precision import Precision
from captioner.search import SearchOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

log = logging.getLogger(__name__)

GPU_BYTES_PER_IMAGE = 40 * 2**20  # activations of VGG16, generously
NUM_WORKERS = 2  # threads that decode
SEED = 123


class CaptionKeywords(SearchKeywords, total=False):
    """How pictures are captioned: how captions are searched, and how the work is done.

    min_confidence: below it a caption is withheld, 0.0 (to 1). seed: of sampling, 123; picture i of a call draws from
    seed + i. batch_size: pictures at once; None: what is fast here. num_workers: threads that decode, 2; 0: the
    caller's. Captions depend on neither of these two. explain: with a map per word of where the model looked, False.
    """

    min_confidence: float
    seed: int
    batch_size: int | None
    num_workers: int
    explain: bool


class Model:
    """A captioning model, or several that average their probabilities, on a device.

    Calls may come from many threads: pictures are decoded in parallel, and the network is used by turns. What a call
    returns depends neither on other calls nor on how pictures are batched.

    Args:
        checkpoints: from `load_models`.
        device: that computes.
        precision: number format of the CNN.
        calibration: photos like those to come; only looked at where 8-bit scales have to be measured.

    Raises:
        InputError: this machine cannot compute at that precision.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        device: torch.device,
        precision: Precision = "auto",
        calibration: Images | None = None,
    ) -> None:
        self.image_mode = checkpoints[0].config.image_mode  # what becomes of pictures that are no squares
        photos = ImageList([]) if calibration is None else calibration

        def first_photos(count: int) -> Iterator[Batch]:
            return photos.batches(shares(min(count, len(photos)), 8, 0, 1), NUM_WORKERS, self.image_mode)

        self.captioner = make_captioner(checkpoints, device, precision, first_photos)
        self._decoding = checkpoints[0].decoding

    @property
    def vocab(self) -> Vocab:
        """The words it can say."""
        return self.captioner.vocab

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.captioner.device

    @overload  # a str is one picture, though also an Iterable of str
    def caption(  # type: ignore[overload-overlap]
        self,
        images: ImageLike,
        *,
        on_error: Literal["raise"] = "raise",
        **options: "Unpack[CaptionKeywords]",
    ) -> Caption: ...

    @overload
    def caption(
        self,
        images: Iterable[ImageLike],
        *,
        on_error: Literal["raise"] = "raise",
        **options: "Unpack[CaptionKeywords]",
    ) -> list[Caption]: ...

    @overload
    def caption(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        on_error: Literal["raise", "return"],
        **options: "Unpack[CaptionKeywords]",
    ) -> Caption | InputError | list[Caption | InputError]: ...

    def caption(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        on_error: Literal["raise", "return"] = "raise",
        **options: "Unpack[CaptionKeywords]",
    ) -> Caption | InputError | Sequence[Caption | InputError]:
        """Caption one picture, or several.

        Args:
            images: a path, the bytes of a file, a Pillow image, an array (uint8, height × width × 3, RGB); or several.
            on_error: at a picture that cannot be read "raise", or "return" the error in its place.
            options: `beam_size`, `n_best`, ..: see `CaptionKeywords`.

        Returns:
            For one picture its caption; for several a list in their order.

        Raises:
            InputError: a picture cannot be read (`on_error` "raise"), or an option makes no sense.
        """
        if on_error not in ("raise", "return"):
            raise InputError(f"on_error {on_error!r}", expected="'raise' or 'return'")
        found: list[Caption | InputError] = []
        for caption in self._captions(ImageList(as_list(images)), **options):
            if isinstance(caption, InputError) and on_error == "raise":
                raise caption
            found.append(caption)
        return found[0] if is_image_like(images) else found

    def caption_folder(
        self,
        folder: str | os.PathLike[str],
        *,
        recursive: bool = False,
        on_error: Literal["raise", "skip"] = "skip",
        **options: "Unpack[CaptionKeywords]",
    ) -> Iterator[Caption]:
        """Caption the photos of a folder in natural order (img2 before img10), while they are read in the background.

        Args:
            recursive: those of its subfolders too.
            on_error: at a file that cannot be read "raise", or log a warning and "skip" it.
            options: as for `caption`.

        Returns:
            The captions as they come; their `file_name` is relative to the folder.

        Raises:
            InputError: no such folder, no picture in it, or an option makes no sense; said at once.
        """
        if on_error not in ("raise", "skip"):
            raise InputError(f"on_error {on_error!r}", expected="'raise' or 'skip'")
        captions = self._captions(open_folder(os.fspath(folder), recursive, -1), **options)

        def readable() -> Iterator[Caption]:
            for caption in captions:
                if isinstance(caption, Caption):
                    yield caption
                elif on_error == "raise":
                    raise caption
                else:
                    log.warning("skipped %s", caption)

        return readable()

    @overload
    def logprob(  # type: ignore[overload-overlap]
        self, image: ImageLike, captions: str
    ) -> float: ...

    @overload
    def logprob(self, image: ImageLike, captions: Sequence[str]) -> list[float]: ...

    def logprob(self, image: ImageLike, captions: str | Sequence[str]) -> float | list[float]:
        """Natural log of p(caption | image) of one caption or of several, over their words and END.

        A word that the model does not know counts as UNK; where the model has no UNK the caption has −inf.

        Raises:
            InputError: the picture cannot be read.
        """
        one = isinstance(captions, str)
        (batch,) = ImageList([image]).batches([range(1)], 0, self.image_mode)
        if batch.skipped:
            raise InputError(batch.skipped[0][1])
        texts = [captions] if isinstance(captions, str) else captions
        logprobs = [found.logprob for found in judge(self.captioner, batch, texts)]
        return logprobs[0] if one else logprobs

    def search_options(self, **keywords: "Unpack[SearchKeywords]") -> SearchOptions:
        """How to search: what is asked for, else what suits the model; see `SearchKeywords`.

        Raises:
            InputError: a value is out of range, or the model does not know a word.
        """
        if keywords.get("rerank") == "models" and len(self.captioner.models) < 2:
            raise InputError("rerank by models needs several models", remedy="name them all, or rerank by consensus")
        return search_options_of(self.vocab, self.captioner.max_length, self._decoding, **keywords)

    def fast_batch_size(self) -> int:
        """How many images at once are fast on this device, and fit into its memory."""
        if self.device.type != "cuda":
            return 8  # caches are warm, and the first caption does not wait for a large batch
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(256, free // GPU_BYTES_PER_IMAGE))

    def run(
        self,
        images: Images,
        groups: Iterable[Sequence[int]],
        options: SearchOptions,
        *,
        seed: int = SEED,
        num_workers: int = NUM_WORKERS,
        explain: bool = False,
    ) -> Iterator[Evaluated]:
        """Search captions of `images` batch by batch; where captions are known, with their loss.

        Args:
            groups: the positions of each batch (see `shares`).
            explain: with a map per word of where the model looked.
        """
        batches = images.batches(groups, num_workers, self.image_mode)
        return self.run_batches(batches, options, seed=seed, explain=explain)

    def run_batches(
        self, batches: Iterable[Batch], options: SearchOptions, *, seed: int = SEED, explain: bool = False
    ) -> Iterator[Evaluated]:
        """The same of batches that are read elsewhere; on a GPU one ahead."""
        return evaluate(self.captioner, batches, options, seed, explain)

    def captions_of(self, evaluated: Evaluated, min_confidence: float = 0.0) -> list[Caption]:
        """What `run` found, in words; below `min_confidence` a caption is withheld."""
        return captions_of(evaluated, self.vocab, min_confidence)

    def likelihoods(
        self, batches: Iterable[Batch], captions: Sequence[Sequence[str]]
    ) -> Iterator[tuple[int, list[Likelihood]]]:
        """What the model thinks of given captions, each with its own and with other pictures (see `likelihood`)."""
        return likelihoods(self.captioner, batches, captions)

    def _captions(
        self,
        images: Images,
        *,
        min_confidence: float = 0.0,
        seed: int = SEED,
        batch_size: int | None = None,
        num_workers: int = NUM_WORKERS,
        explain: bool = False,
        **search: "Unpack[SearchKeywords]",
    ) -> Iterator[Caption | InputError]:
        """One result for each image, in order; options that make no sense are refused at once."""
        if not 0 <= min_confidence <= 1:
            raise InputError(f"min_confidence {min_confidence}", expected="0 to 1")
        if num_workers < 0 or (batch_size is not None and batch_size < 1):
            raise InputError(f"num_workers {num_workers}, batch_size {batch_size}", expected="at least 0, at least 1")
        groups = list(shares(len(images), batch_size or self.fast_batch_size(), 0, 1))
        batches = self.run(
            images, groups, self.search_options(**search), seed=seed, num_workers=num_workers, explain=explain
        )

        def results() -> Iterator[Caption | InputError]:
            for group, evaluated in zip(groups, batches, strict=True):
                found = dict(zip(evaluated.positions, self.captions_of(evaluated, min_confidence), strict=True))
                reasons = iter(evaluated.skipped)
                for position in group:
                    if position in found:
                        yield found[position]
                    else:
                        name, reason = next(reasons)
                        yield InputError(reason if name else f"picture {position + 1} of {len(images)}: {reason}")

        return results()


def load_model(
    model: "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None" = None,
    device: "str | torch.device" = "auto",
    precision: Precision = "auto",
    calibration: Sequence[ImageLike] = (),
) -> Model:
    """Load a captioning model.

    Args:
        model: a checkpoint; several, whose probabilities are averaged; None: the bundled one.
        device: "auto", or what torch calls it: "cpu", "cuda", "cuda:1", "mps".
        precision: number format of the CNN: "auto", "fp32", "bf16", "fp16" or "int8".
        calibration: for "int8" with a model whose 8-bit scales are not known yet: some 48 photos like those to come.

    Raises:
        InputError: the file cannot be used, the models do not fit together, or this machine lacks the device or the
            number format.
    """
    paths: Sequence[str | os.PathLike[str]] = []
    if isinstance(model, str | os.PathLike):
        paths = [model]
    elif model is not None:
        paths = list(model)
        if not paths:
            raise InputError("load_model([]): no model is named", expected="a path, several, or None")
    return Model(load_models([Path(path) for path in paths]), device_named(device), precision, ImageList(calibration))
