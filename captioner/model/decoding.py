"""The search options that travel with a model: in force wherever the user gives no such option."""

from collections.abc import Mapping
from typing import Any

from captioner.errors import InputError

# The options a model's file may set, with the values in force where neither it nor the user says anything: the
# original's. Words are written out, for their ids change with the vocabulary.
DEFAULTS: dict[str, Any] = {
    "beam_size": 2,
    "length_penalty": 0.0,
    "no_immediate_repeat": False,
    "repeatable": (),
    "suppress_unk": False,
    "bad_endings": (),
}

# Words after which an English caption is not complete: articles and the like, prepositions, conjunctions. Adverbs that
# end sentences ("lies down", "looks up") are not among them.
UNFINISHED = (
    *"a an the this that these those his their its some several".split(),
    *"of in on at with by for from to into onto inside near against between among behind beside beneath".split(),
    *"under over above below across through along around during without toward towards next".split(),
    *"and or but while as who which is are".split(),
)

# Words that an English caption may need twice; naming a thing twice ("a sink and a sink") is a fault of the search.
REPEATABLE = (
    *"a an the this that these those his her its their some other another each one two three four".split(),
    *"of in on at with by for from to into onto near next front back side top behind under over up down".split(),
    *"and or but while as who which is are 's ,".split(),
)

# What was found best for attending models.
OF_ATTENTION: dict[str, Any] = {
    "beam_size": 3,
    "length_penalty": 0.7,
    "no_immediate_repeat": 1,
    "repeatable": list(REPEATABLE),
    "suppress_unk": 1,
    "bad_endings": list(UNFINISHED),
}


def decoding_for_new_model(decoder: str) -> dict[str, Any]:
    """What `Checkpoint.decoding` of a newly trained model is, by the kind of its decoder."""
    return dict(OF_ATTENTION) if decoder == "attention" else {"suppress_unk": 1}


def in_force(name: str, given: Any, decoding: Mapping[str, Any]) -> Any:
    """The value of one of the options above: what is given, else what the model's file says, else the default.

    Raises:
        InputError: the model's file says something that is no value for it.
    """
    if given is not None:
        return given
    default = DEFAULTS[name]
    value = decoding.get(name, default)
    if isinstance(default, tuple):
        sound = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
    elif isinstance(default, float):
        sound = isinstance(value, int | float)
    else:
        sound = isinstance(value, int)
    if not sound:
        raise InputError(f"the model's file asks for {name} {value!r}", remedy="say yourself what it shall be")
    return value
