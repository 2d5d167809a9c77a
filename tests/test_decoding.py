"""Search options that travel with a model: in force unless the user says otherwise."""

import dataclasses

import pytest
import torch

import captioner
from captioner.data.batch import PixelInputs
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.model import Model
from captioner.model.caption_model import CaptionModel, build_model
from captioner.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.model.config import ModelConfig
from captioner.model.decoding import UNFINISHED, decoding_for_new_model
from captioner.search import EnsembleState, SearchOptions, ensemble_step

WORDS = ["a", "dog", "of", "runs", "UNK"]
CPU = torch.device("cpu")


def make_checkpoint(decoder: str = "attention", seed: int = 0, **decoding: object) -> Checkpoint:
    torch.manual_seed(seed)
    config = ModelConfig(
        len(WORDS), 6, encoding_size=8, rnn_size=8, cnn_layer="pool5", conv_widths=(3,) * 13, decoder=decoder
    )
    return Checkpoint(config, Vocab(WORDS), CaptionModel(config).state_dict(), decoding=decoding)


def test_what_nobody_says_is_the_originals_way():
    assert Model([make_checkpoint()], CPU).search_options() == SearchOptions(beam_size=2)


def test_the_file_decides_and_the_user_overrules():
    asks = {"beam_size": 3, "length_penalty": 0.7, "no_immediate_repeat": 1, "suppress_unk": 1, "precision": "fp32"}
    asks |= {"bad_endings": ["of", "with", "a"], "repeatable": ["a", "an", "of"]}
    model = Model([make_checkpoint(**asks)], CPU)
    suited = SearchOptions(
        beam_size=3,
        length_penalty=0.7,
        no_immediate_repeat=True,
        repeatable=(1, 3),
        suppress=(5,),
        bad_endings=(3, 1),
    )
    assert model.search_options() == suited
    assert model.search_options(beam_size=1) == dataclasses.replace(suited, beam_size=1)
    assert model.search_options(n_best=4) == dataclasses.replace(suited, beam_size=4, n_best=4, kept=4)
    free = {
        "length_penalty": 0.0,
        "no_immediate_repeat": False,
        "suppress_unk": False,
        "bad_endings": [],
        "repeatable": [],
    }
    assert model.search_options(beam_size=2, **free) == SearchOptions(beam_size=2)
    assert model.search_options(bad_endings=["runs"]).bad_endings == (4,)


@pytest.mark.parametrize(
    ("name", "value"), [("beam_size", "3"), ("length_penalty", None), ("bad_endings", "a"), ("bad_endings", [1])]
)
def test_a_file_that_asks_for_nonsense_is_named(name, value):
    model = Model([make_checkpoint(**{name: value or "x"})], CPU)
    with pytest.raises(InputError, match=f"the model's file asks for {name}"):
        model.search_options()


def test_attending_models_come_with_options_of_their_own():
    decoding = decoding_for_new_model("attention")
    options = Model([make_checkpoint(**decoding)], CPU).search_options()
    assert (options.beam_size, options.length_penalty, options.bad_endings) == (3, 0.7, (1, 3))
    assert options.repeatable == (1, 3)
    assert decoding_for_new_model("lstm") == {"suppress_unk": 1}
    assert {"a", "the", "of", "on", "with", "and"} <= set(UNFINISHED) and len(set(UNFINISHED)) == len(UNFINISHED)


def some_images() -> list:
    return list(torch.randint(0, 256, (6, 40, 40, 3), dtype=torch.uint8).numpy())


def test_captions_obey_the_file_and_the_command_line(tmp_path, command):
    """A model that would say "of of of ..": not at the end, not twice in a row, unless the user wants it."""
    checkpoint = make_checkpoint(bad_endings=["of"], no_immediate_repeat=1, beam_size=3)
    checkpoint.state_dict["decoder.output_bias"][2] = 4.0
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    assert load_checkpoint(tmp_path / "model.pt").decoding == checkpoint.decoding
    (tmp_path / "photos").mkdir()
    from PIL import Image

    for i, pixels in enumerate(some_images()):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")

    def captions(*extra: object) -> list[str]:
        argv = ["--model", tmp_path / "model.pt", "--image_folder", tmp_path / "photos", "--vis_dir", "", "--gpuid", -1]
        done = command("eval", *argv, *extra)
        assert done.returncode == 0, done.stderr
        return [line.split(": ", 1)[1].rsplit("  (", 1)[0] for line in done.stdout.splitlines()]

    assert all("of" in text.split() and "of of" not in text and not text.endswith("of") for text in captions())
    wild = captions("--bad_endings", "", "--no_immediate_repeat", "0", "--beam_size", 1)
    assert all(text == "of of of of of of" for text in wild)
    assert all(text.endswith("of") for text in captions("--bad_endings", "dog,runs", "--no_immediate_repeat", 0))


def test_attending_models_name_nothing_twice():
    """A model that would say "dog of dog of dog ..": "of" may occur twice, "dog" may not."""
    checkpoint = make_checkpoint(**decoding_for_new_model("attention"))
    checkpoint.state_dict["decoder.output_bias"][[1, 2]] = 9.0
    model = Model([checkpoint], CPU)
    assert all(caption.text.split().count("dog") == 1 for caption in model.caption(some_images()))
    free = model.caption(some_images(), repeatable=[])
    assert all(caption.text.split().count("dog") > 1 for caption in free)


@pytest.mark.parametrize("first", ["lstm", "attention"])
def test_both_kinds_of_decoder_caption_together(first, tmp_path):
    second = "attention" if first == "lstm" else "lstm"
    paths = []
    for i, decoder in enumerate((first, second)):
        paths.append(tmp_path / f"{i}.pt")
        checkpoint = make_checkpoint(decoder, seed=i)
        checkpoint.state_dict[f"decoder.output{'_' if decoder == 'attention' else '.'}bias"][-1] += 1.5  # END
        save_checkpoint(paths[-1], checkpoint)
    together, images = captioner.load_model(paths, "cpu"), some_images()
    finished = 0
    for image, found in zip(images, together.caption(images, beam_size=3, n_best=3), strict=True):
        assert len(found.alternatives) == 2
        for caption in (found, *found.alternatives):
            if len(caption.words) < 6:  # ended, not cut: END counts
                finished += 1
                assert together.logprob(image, caption.text) == pytest.approx(caption.logprob, abs=1e-4)
    assert finished > 3
    # Of one word after START the ensemble thinks what its models think on average.
    pixels = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    networks = [build_model(load_checkpoint(path)) for path in paths]
    with torch.no_grad():
        logprobs = [net.decoder(net.encode(PixelInputs(pixels)), torch.tensor([[2]]))[0, -2, 1] for net in networks]
    state = EnsembleState(tuple(net.decoder.start(net.encode(PixelInputs(pixels))) for net in networks))
    with torch.no_grad():
        mean, _ = ensemble_step([net.decoder.step for net in networks])(torch.tensor([6]), state)
    assert float(mean[0, 1].exp()) == pytest.approx(sum(float(x.exp()) for x in logprobs) / 2, abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_says_nearly_the_same(precision, tmp_path):
    save_checkpoint(tmp_path / "model.pt", make_checkpoint("attention"))
    images = some_images()
    exact, rounded = (captioner.load_model(tmp_path / "model.pt", "cpu", chosen) for chosen in ("fp32", precision))
    for wanted, found in zip(exact.caption(images), rounded.caption(images), strict=True):
        assert found.logprob == pytest.approx(wanted.logprob, abs=0.1)
