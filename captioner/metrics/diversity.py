"""How varied captions are: a model that says the same safe sentence for every picture scores well enough otherwise."""

from collections.abc import Iterable, Sequence


def diversity(captions: Sequence[str], known: Iterable[str] | None = None) -> dict[str, float]:
    """Figures on N tokenised captions.

    Args:
        captions: N captions, words separated by blanks.
        known: tokenised captions, say of the training set; a caption that is none of them is novel.

    Returns:
        distinct_captions: how many different ones; distinct_share: of N; vocabulary: different words used;
        mean_length: words per caption; with `known`, novel_share: of N.
    """
    words = [caption.split() for caption in captions]
    figures: dict[str, float] = {
        "distinct_captions": len(set(captions)),
        "distinct_share": len(set(captions)) / len(captions),
        "vocabulary": len(set().union(*words)),
        "mean_length": sum(map(len, words)) / len(captions),
    }
    if known is not None:
        seen = set(known)
        figures["novel_share"] = sum(caption not in seen for caption in captions) / len(captions)
    return figures
