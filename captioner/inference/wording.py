"""What users say about words (required, banned, a beginning) → ids, or one line about what the model cannot say."""

import difflib
from collections.abc import Iterable, Sequence

from captioner.data.tokenizers import tokenise
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError

MOST_NAMED = 5  # unknown words in one line


def requirements_of(text: str) -> list[list[str]]:
    """What users write for `required_ids`: dog/dogs,beach is [["dog", "dogs"], ["beach"]]."""
    return [[form.strip() for form in one.split("/") if form.strip()] for one in text.split(",") if one.strip()]


def banned_of(text: str) -> list[str]:
    """What users write for `banned_ids`: words between commas, or between strokes as in `requirements_of`."""
    return [form for forms in requirements_of(text) for form in forms]


def required_ids(
    require: "str | Sequence[str | Sequence[str]]", vocab: Vocab
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """`SearchOptions.require` of words and phrases, each of them one text or its several forms.

    Raises:
        InputError: the model does not know a word.
    """
    several = [[one] if isinstance(one, str) else list(one) for one in _listed(require)]
    _require_known("require", [form for forms in several for form in forms], vocab)
    if not all(several):
        raise InputError("require: no word in one of its groups")
    return tuple(tuple(dict.fromkeys(_ids("require", form, vocab) for form in forms)) for forms in several)


def banned_ids(ban: "str | Sequence[str]", vocab: Vocab) -> tuple[int, ...]:
    """Ids of words that are never to be said.

    Raises:
        InputError: the model does not know a word, or there is a phrase among them.
    """
    words = _listed(ban)
    _require_known("ban", words, vocab)
    ids = [_ids("ban", word, vocab) for word in words]
    phrase = next((word for word, found in zip(words, ids, strict=True) if len(found) > 1), None)
    if phrase is not None:
        raise InputError(
            f"ban {phrase!r}", expected="single words", remedy="name that word of it which must not be said"
        )
    return tuple(dict.fromkeys(word for (word,) in ids))


def prefix_ids(text: str, vocab: Vocab) -> tuple[int, ...]:
    """Ids of the words that captions begin with; none of an empty text.

    Raises:
        InputError: the model does not know a word.
    """
    if not text.strip():
        return ()
    _require_known("caption_prefix", [text], vocab)
    return _ids("caption_prefix", text, vocab)


def require_sayable(
    require: Sequence[Sequence[Sequence[int]]], ban: Sequence[int], prefix: Sequence[int], vocab: Vocab
) -> None:
    """Refuse what is wanted and banned at once.

    Raises:
        InputError: naming the word.
    """
    hopeless = [forms[0] for forms in require if all(set(form) & set(ban) for form in forms)]
    for name, words in [("caption_prefix", prefix), *(("require", form) for form in hopeless)]:
        for word in words:
            if word in ban:
                raise InputError(f"{name} wants {vocab.word(word)!r}, and ban forbids it", expected="one of them")


def _listed(texts: "str | Iterable[str | Sequence[str]]") -> list:
    return [texts] if isinstance(texts, str) else list(texts)


def _ids(name: str, text: str, vocab: Vocab) -> tuple[int, ...]:
    words = tokenise(text, vocab.tokenizer)
    if not words:
        raise InputError(f"{name} {text!r}: there is no word in it")
    return tuple(vocab.encode(words, len(words)))


def _require_known(name: str, texts: Sequence[str], vocab: Vocab) -> None:
    words = dict.fromkeys(word for text in texts for word in tokenise(text, vocab.tokenizer))
    unknown = [word for word in words if word not in vocab]
    if not unknown:
        return
    told = []
    for word in unknown[:MOST_NAMED]:
        near = difflib.get_close_matches(word, vocab.words, n=1)
        told.append(f"{word!r} (nearest: {near[0]!r})" if near else repr(word))
    more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
    raise InputError(
        f"{name}: the model does not know {', '.join(told)}{more}", expected=f"words among its {vocab.size}"
    )
