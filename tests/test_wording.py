"""Required and banned words, greatest length and beginning, from outside: the command and the Python interface."""

import numpy as np
import pytest
from PIL import Image

import captioner
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.wording import banned_ids, prefix_ids, required_ids

VOCAB = Vocab(["a", "dog", "dogs", "fire", "hydrant", "frisbee", "don't", "UNK"], "unicode")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 256, size=(64, 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def captions(photos, tiny_model, command):
    def run(*arguments):
        done = command(
            "eval", photos, "--model", tiny_model, "--gpuid", -1, "--precision", "fp32", "--vis_dir", "", *arguments
        )
        lines = [line.split(": ", 1)[1].rsplit("  ", 1)[0] for line in done.stdout.splitlines()]
        return done.returncode, lines, done.stderr.splitlines()

    return run


def test_the_command_says_what_it_is_told(captions):
    code, said, log = captions(
        *(
            "--require",
            "blue/grey, all",
            "--ban",
            "it",
            "--max-words",
            6,
            "--caption_prefix",
            "A picture",
            "-beam_size",
            3,
        )
    )
    assert code == 0, log
    assert len(said) == 3
    for caption in said:
        words = caption.split()
        assert words[:2] == ["a", "picture"] and len(words) <= 6
        assert {"blue", "grey"} & set(words) and "all" in words and "it" not in words


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--require", "pictures,red"], "require: the model does not know 'pictures' (nearest: 'picture'); expected"),
        (["--ban", "gray/xylophone"], "ban: the model does not know 'gray' (nearest: 'grey'), 'xylophone'; expected"),
        (["--caption_prefix", "a pic of"], "caption_prefix: the model does not know 'pic' (nearest: 'picture'), 'of'"),
        (["--require", "red", "--ban", "red"], "require wants 'red', and ban forbids it"),
        (["--require", "red,blue", "--max_words", 1], "takes 2 words, and they have 1 at most"),
        (["--require", "red", "--sample_max", 0], "required words take a plain beam search"),
        (["--ban", "red picture"], "ban 'red picture'; expected single words"),
    ],
)
def test_what_cannot_be_said_is_one_line(captions, arguments, told):
    code, said, log = captions(*arguments)
    assert (code, said) == (1, [])
    assert log[-1].startswith("caption-eval: error: ") and told in log[-1]
    assert "Traceback" not in "".join(log)


def test_from_python_batches_are_singles_and_ensembles_obey(photos, tiny_model):
    pictures = sorted(photos.iterdir())
    model = captioner.load_model([tiny_model, tiny_model], "cpu", "fp32")
    asked = {"require": ["red", ["blue", "is all"]], "ban": "picture", "max_words": 7, "beam_size": 3, "n_best": 2}
    together = model.caption(pictures, **asked, batch_size=3)
    alone = [model.caption(picture, **asked) for picture in pictures]
    assert [found.text for found in together] == [found.text for found in alone]
    for found in together:
        for caption in (found, *found.alternatives):
            words = caption.text.split()
            assert "red" in words and ("blue" in words or "is all" in caption.text)
            assert "picture" not in words and len(words) <= 7
    assert len(together[0].alternatives) == 1


def test_words_are_split_as_the_models_are():
    assert required_ids(["Dog!", ["fire hydrant", "frisbee", "Frisbee"]], VOCAB) == (((2,),), ((4, 5), (6,)))
    assert required_ids("dog", VOCAB) == (((2,),),)
    assert banned_ids(["a", "DOGS", "dogs"], VOCAB) == (1, 3)
    assert prefix_ids(" A dog", VOCAB) == (1, 2) and prefix_ids(" ", VOCAB) == ()


@pytest.mark.parametrize(
    "require", [["..."], [[]], [""], ["UNK"], ["frisbe"] * 2 + ["w1", "w2", "w3", "w4", "w5", "w6"]]
)
def test_what_is_no_word_is_refused(require):
    with pytest.raises(InputError) as refused:
        required_ids(require, VOCAB)
    assert len(str(refused.value)) < 250
