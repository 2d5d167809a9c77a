"""What a dataset shall be, apart from its pictures and captions."""

from dataclasses import dataclass

from captioner.data.image_mode import ImageMode


@dataclass(frozen=True)
class DatasetOptions:
    """Those options of `prepare` that the dataset's content depends on; it says what each of them means."""

    num_val: int
    num_test: int = 0
    max_length: int = 16
    word_count_threshold: int = 5
    tokenizer: str = "ascii"
    image_mode: ImageMode = "squash"
    seed: int = 123
