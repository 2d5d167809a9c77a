"""Searches against brute force over all sequences, against single calls, and against the original's captions."""

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from test_attention_decoder import make_decoder as make_attention_decoder
from test_decoder import MODELS, load_original, make_decoder
from torch import Tensor

from captioner.errors import InputError
from captioner.model.decoder import Decoder
from captioner.search import EnsembleState, Hypothesis, SearchOptions, ensemble_step, search


@dataclass(frozen=True)
class TableState:
    rows: Tensor
    device = torch.device("cpu")

    def select(self, rows: Tensor, per_image: int | None = None) -> "TableState":
        left = self.rows[rows]
        if per_image is not None:
            assert set(Counter(left[:, 0].tolist()).values()) == {per_image}
        return TableState(left)


class TableModel:
    """A made-up language model: the logprobs (P, V+1) of every prefix come from a table per image.

    A state's rows (R, 2) are [image, number of the prefix]; prefixes are numbered in base V+2.
    """

    def __init__(self, tables: list[dict[tuple[int, ...], Tensor]], vocab_size: int) -> None:
        self.tables, self.vocab_size = tables, vocab_size

    def start(self) -> "TableState":
        return TableState(torch.tensor([[image, -1] for image in range(len(self.tables))]))

    def step(self, tokens: Tensor, state: "TableState") -> tuple[Tensor, "TableState"]:
        rows, numbers = [], []
        for token, (image, number) in zip(tokens.tolist(), state.rows.tolist(), strict=True):
            number = 0 if number < 0 else number * (self.vocab_size + 2) + token
            rows.append(self.tables[image][self.prefix(number)])
            numbers.append([image, number])
        return torch.stack(rows), TableState(torch.tensor(numbers))

    def prefix(self, number: int) -> tuple[int, ...]:
        ids: tuple[int, ...] = ()
        while number:
            number, token = divmod(number, self.vocab_size + 2)
            ids = (token, *ids)
        return ids

    def search(self, max_length: int, options: SearchOptions, **kwargs) -> list[list[Hypothesis]]:
        return search(
            self.step,
            self.start(),
            num_images=len(self.tables),
            vocab_size=self.vocab_size,
            max_length=max_length,
            options=options,
            **kwargs,
        )


def make_tables(num_images: int, vocab_size: int, max_length: int, sharpness: float, seed: int) -> TableModel:
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for _ in range(num_images):
        table = {}
        for length in range(max_length):
            # END (id V+1) may be fed by a search that keeps finished beams.
            for prefix in itertools.product(range(1, vocab_size + 2), repeat=length):
                table[prefix] = (sharpness * torch.randn(vocab_size + 1, generator=generator)).log_softmax(0)
        tables.append(table)
    return TableModel(tables, vocab_size)


def all_captions(table: dict, vocab_size: int, max_length: int) -> dict[tuple[int, ...], float]:
    """Every caption there is, with its log-probability (END included unless it is of full length)."""
    end_id, found = vocab_size + 1, {}

    def grow(prefix: tuple[int, ...], logprob: float) -> None:
        if len(prefix) == max_length:
            found[prefix] = logprob
            return
        row = table[prefix].tolist()
        found[prefix] = logprob + row[end_id - 1]
        for word in range(1, end_id):
            grow((*prefix, word), logprob + row[word - 1])

    grow((), 0.0)
    return found


@pytest.mark.parametrize("vocab_size", [1, 2, 4])
@pytest.mark.parametrize("max_length", [1, 2, 4])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 6.0])
def test_a_wide_beam_finds_the_likeliest_captions_of_all(vocab_size, max_length, sharpness):
    model = make_tables(3, vocab_size, max_length, sharpness, seed=max_length)
    width = 5 * (vocab_size + 1) ** max_length
    found = model.search(max_length, SearchOptions(beam_size=width, n_best=5))
    for table, hypotheses in zip(model.tables, found, strict=True):
        expected = sorted(all_captions(table, vocab_size, max_length).items(), key=lambda item: -item[1])[:5]
        assert [h.tokens for h in hypotheses] == [tokens for tokens, _ in expected]
        for hypothesis, (tokens, logprob) in zip(hypotheses, expected, strict=True):
            assert hypothesis.logprob == pytest.approx(logprob, abs=1e-5)
            assert hypothesis.finished == (len(tokens) < max_length or len(hypothesis.word_logprobs) > len(tokens))


DECODERS = {
    "lstm": lambda: (make_decoder(vocab_size=10, rnn=16, seed=2), 3 * torch.randn(64, 4).double()),
    "two layers": lambda: (make_decoder(vocab_size=10, rnn=16, layers=2, seed=2), 3 * torch.randn(64, 4).double()),
    "attention": lambda: (make_attention_decoder(vocab_size=10, rnn=16, seed=2), torch.randn(64, 5, 4).double()),
}


@pytest.fixture(params=DECODERS)
def network(request):
    """A decoder and what it sees of 64 images."""
    return DECODERS[request.param]()


def test_beam_1_is_greedy_search(network):
    decoder, features = network
    found = run(decoder, features, SearchOptions(beam_size=1))
    for feature, (hypothesis,) in zip(features, found, strict=True):
        state, token, tokens = decoder.start(feature.unsqueeze(0)), decoder.end_id, []
        for _ in range(7):
            logprobs, state = decoder.step(torch.tensor([token]), state)
            token = int(logprobs.argmax()) + 1
            if token == decoder.end_id:
                break
            tokens.append(token)
        assert hypothesis.tokens == tuple(tokens)


def run(decoder, features: Tensor, options: SearchOptions, max_length: int = 7, **kwargs) -> list[list[Hypothesis]]:
    with torch.no_grad():
        return search(
            decoder.step,
            decoder.start(features),
            num_images=len(features),
            vocab_size=decoder.vocab_size,
            max_length=max_length,
            options=options,
            **kwargs,
        )


EVERY_KIND = {
    "greedy": SearchOptions(beam_size=1),
    "beam": SearchOptions(beam_size=3),
    "n_best": SearchOptions(beam_size=5, n_best=5, length_penalty=0.7),
    "rules": SearchOptions(beam_size=3, min_length=3, no_repeat_ngram=2, suppress=(2, 7)),
    "endings": SearchOptions(beam_size=3, bad_endings=(4, 8), no_immediate_repeat=True),
    "once": SearchOptions(beam_size=3, repeatable=(1, 5, 6, 10), length_penalty=0.7),
    "sampled once": SearchOptions(sample=True, n_best=3, repeatable=(1, 5, 6, 10)),
    "groups": SearchOptions(beam_size=6, groups=3, n_best=4),
    "as the original": SearchOptions(beam_size=3, keep_finished=True),
    "sample": SearchOptions(sample=True, n_best=3),
    "filtered sample": SearchOptions(sample=True, temperature=0.7, top_k=5, top_p=0.8, no_repeat_ngram=1),
    "sampled endings": SearchOptions(sample=True, n_best=3, bad_endings=(4, 8), no_immediate_repeat=True),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_batch_gives_what_single_images_give(kind, network, device):
    decoder, features = (part.to(device) for part in network)
    with torch.no_grad():  # captions that differ, and not only in length
        for parameter in decoder.parameters():
            parameter *= 4 if isinstance(decoder, Decoder) else 1.5
    seeds = list(range(64))
    batch = run(decoder, features, EVERY_KIND[kind], seeds=seeds)
    singles = [run(decoder, features[i : i + 1], EVERY_KIND[kind], seeds=seeds[i : i + 1])[0] for i in range(64)]
    assert [[h.tokens for h in image] for image in batch] == [[h.tokens for h in image] for image in singles]
    for together, alone in zip(itertools.chain(*batch), itertools.chain(*singles), strict=True):
        assert together.word_logprobs == pytest.approx(alone.word_logprobs, abs=1e-5)
    assert len({h.tokens for image in batch for h in image}) > 7  # the comparison means something


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_hypotheses_are_well_formed(kind, network):
    decoder, features = network
    options = EVERY_KIND[kind]
    for image in run(decoder, features[:5], options):
        assert 1 <= len(image) <= options.n_best
        for h in image:
            assert all(1 <= token <= 10 for token in h.tokens)
            assert len(h.word_logprobs) == len(h.tokens) + h.finished
            assert h.finished or len(h.tokens) == 7
            assert h.logprob == pytest.approx(sum(h.word_logprobs))
            assert h.confidence == pytest.approx(math.exp(h.logprob / len(h.word_logprobs)))
            assert not set(h.tokens[-1:]) & set(options.bad_endings)
            if options.no_immediate_repeat:
                assert all(a != b for a, b in itertools.pairwise(h.tokens))
            assert not options.repeatable or not repeats(said_once(h.tokens, options), 1)


@torch.no_grad()
def test_a_wide_beam_over_an_attending_model_finds_the_likeliest_captions_of_all():
    decoder, grids = make_attention_decoder(vocab_size=3), torch.randn(3, 5, 4).double()
    every = list(itertools.product(range(1, 4), repeat=3))
    logprobs = decoder(grids, torch.tensor(every * 3), torch.arange(3).repeat_interleave(len(every)))
    found = run(decoder, grids, SearchOptions(beam_size=400, n_best=6), max_length=3)
    for own, hypotheses in zip(logprobs.view(3, len(every), 4, 4), found, strict=True):
        captions = {}
        for ids, table in zip(every, own.tolist(), strict=True):
            words = [table[t][word - 1] for t, word in enumerate(ids)]
            captions[ids] = sum(words)  # cut at the greatest length, without END
            captions |= {ids[:t]: sum(words[:t]) + table[t][3] for t in range(3)}
        expected = sorted(captions, key=lambda caption: -captions[caption])[:6]
        assert [h.tokens for h in hypotheses] == expected
        assert [h.logprob for h in hypotheses] == pytest.approx([captions[tokens] for tokens in expected])


def said_once(tokens: tuple[int, ...], options: SearchOptions) -> tuple[int, ...]:
    return tuple(word for word in tokens if word not in options.repeatable)


def repeats(tokens: tuple[int, ...], n: int) -> bool:
    ngrams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
    return len(set(ngrams)) < len(ngrams)


@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize(
    "rules",
    [
        {"length_penalty": 1.0},
        {"length_penalty": 2.5},
        {"min_length": 2},
        {"no_repeat_ngram": 1},
        {"no_repeat_ngram": 2, "length_penalty": 0.5},
        {"suppress": (1,), "min_length": 3},
        {"no_immediate_repeat": True},
        {"repeatable": (2,)},
        {"repeatable": (1, 2, 3)},
        {"repeatable": (1, 3), "length_penalty": 0.7, "min_length": 2, "bad_endings": (3,)},
        {"bad_endings": (2,)},
        {"bad_endings": (1, 3), "no_immediate_repeat": True, "length_penalty": 0.7, "min_length": 1},
    ],
)
def test_a_wide_beam_obeys_every_rule_and_still_finds_the_best(rules, sharpness):
    vocab_size, max_length = 3, 4
    model = make_tables(4, vocab_size, max_length, sharpness, seed=5)
    options = SearchOptions(beam_size=400, n_best=6, **rules)

    def allowed(tokens: tuple[int, ...]) -> bool:
        repeated = options.no_repeat_ngram > 0 and repeats(tokens, options.no_repeat_ngram)
        repeated |= options.no_immediate_repeat and any(a == b for a, b in itertools.pairwise(tokens))
        repeated |= bool(options.repeatable) and repeats(said_once(tokens, options), 1)
        forbidden = set(tokens) & set(options.suppress) or set(tokens[-1:]) & set(options.bad_endings)
        return len(tokens) >= options.min_length and not repeated and not forbidden

    def rank(tokens: tuple[int, ...], logprob: float) -> float:
        return logprob / min(len(tokens) + 1, max_length) ** options.length_penalty

    for table, hypotheses in zip(model.tables, model.search(max_length, options), strict=True):
        captions = {c: p for c, p in all_captions(table, vocab_size, max_length).items() if allowed(c)}
        expected = sorted(captions, key=lambda caption: -rank(caption, captions[caption]))[:6]
        assert [h.tokens for h in hypotheses] == expected
        for h in hypotheses:
            assert h.logprob == pytest.approx(captions[h.tokens], abs=1e-5)


@pytest.mark.parametrize("beam_size", [2, 3])
@pytest.mark.parametrize("length_penalty", [0.7, 1.5])
@pytest.mark.parametrize("sharpness", [0.5, 2.0, 5.0])
def test_with_a_length_penalty_the_end_of_every_beam_competes(sharpness, length_penalty, beam_size):
    vocab_size, max_length = 4, 5
    model = make_tables(8, vocab_size, max_length, sharpness, seed=3)
    options = SearchOptions(beam_size=beam_size, n_best=beam_size, length_penalty=length_penalty)
    for table, hypotheses in zip(model.tables, model.search(max_length, options), strict=True):
        live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        found: dict[tuple[int, ...], float] = {}
        for t in range(max_length):
            extended = []
            for words, logprob in live:
                row = table[words].tolist()
                found[words] = (logprob + row[vocab_size]) / (t + 1) ** length_penalty
                extended += [((*words, k + 1), logprob + row[k]) for k in range(vocab_size)]
            live = sorted(extended, key=lambda caption: -caption[1])[:beam_size]
        found |= {words: logprob / max_length**length_penalty for words, logprob in live}
        expected = sorted(found, key=lambda words: -found[words])[:beam_size]
        assert [h.tokens for h in hypotheses] == expected


@pytest.mark.parametrize("beam_size", [1, 2, 4])
@pytest.mark.parametrize("sample", [False, True])
def test_where_nothing_may_be_said_the_caption_ends(beam_size, sample):
    """One word that must not repeat, in captions of three or more: END comes early rather than no caption."""
    model = make_tables(3, 1, 4, 1.0, seed=0)
    options = SearchOptions(beam_size=beam_size, sample=sample, min_length=3, no_repeat_ngram=1)
    for (hypothesis,) in model.search(4, options):
        assert hypothesis.tokens == (1,)
        assert hypothesis.finished
        assert math.isfinite(hypothesis.logprob)


def test_every_image_gets_a_caption_though_end_is_impossible():
    row = torch.tensor([0.0, 0.0, -math.inf]).log_softmax(0)
    model = TableModel([{p: row for n in range(5) for p in itertools.product((1, 2, 3), repeat=n)}] * 3, 2)
    for options in (*EVERY_KIND.values(), SearchOptions(beam_size=2, length_penalty=2.0)):
        if options.suppress or options.no_repeat_ngram or options.bad_endings or options.repeatable:
            continue  # their rules need more than two words
        for image in model.search(5, options):
            assert image
            assert all(len(h.tokens) == 5 and not h.finished for h in image)


def test_independent_groups_find_what_one_group_finds_and_the_penalty_makes_them_differ():
    model = make_tables(4, 4, 3, 1.0, seed=1)
    alone = model.search(3, SearchOptions(beam_size=2, n_best=2))
    equal = model.search(3, SearchOptions(beam_size=4, groups=2, n_best=2, group_penalty=0.0))
    assert [[h.tokens for h in image] for image in alone] == [[h.tokens for h in image] for image in equal]
    found = model.search(3, SearchOptions(beam_size=4, groups=4, n_best=4, group_penalty=50.0))
    for table, image in zip(model.tables, found, strict=True):
        assert len({(*h.tokens, 5)[0] for h in image}) == 4  # no group begins as another did
        logprobs = [h.logprob for h in image]
        assert logprobs == sorted(logprobs, reverse=True)
        everything = all_captions(table, 4, 3)
        assert logprobs == pytest.approx([everything[h.tokens] for h in image], abs=1e-5)  # without the penalty


def test_samples_follow_the_filtered_distribution():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])  # of words 1, 2, 3 and END
    model = TableModel([{(): probabilities.log()}], 3)
    cases = {
        "all": (SearchOptions(sample=True, n_best=4000), [0.4, 0.3, 0.2, 0.1]),
        "top_k": (SearchOptions(sample=True, n_best=4000, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        "top_p": (SearchOptions(sample=True, n_best=4000, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        "cold": (SearchOptions(sample=True, n_best=4000, temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    }
    for options, expected in cases.values():
        (drawn,) = model.search(1, options, seeds=[7])
        counts = torch.bincount(torch.tensor([(*h.tokens, 4)[0] for h in drawn]), minlength=5)[1:] / 4000
        torch.testing.assert_close(counts, torch.tensor(expected), atol=0.03, rtol=0)
        assert all(h.logprob == pytest.approx(float(probabilities[(*h.tokens, 4)[0] - 1].log())) for h in drawn)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("keep_finished", [True, False])
def test_greedy_and_beam_captions_are_the_originals(reference, model, keep_finished):
    """With finished beams kept, as the original does, and without: see `SearchOptions.keep_finished`."""
    decoder, arrays = load_original(reference, model)
    decodes = json.loads((reference / f"{model}.json").read_text())["decode"]
    for name, decode in decodes.items():
        options = SearchOptions(beam_size=decode["beam_size"], keep_finished=keep_finished)
        found = run(decoder, arrays["decode_features"], options, max_length=16)
        for column, ((hypothesis,), ids) in enumerate(zip(found, decode["seq_columns"], strict=True)):
            ids = ids[: ids.index(decoder.end_id) + 1] if decoder.end_id in ids else ids
            assert list(hypothesis.tokens) == [i for i in ids if i != decoder.end_id]
            expected = arrays[f"logprobs_{name}"][: len(ids), column]
            assert hypothesis.word_logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_an_ensemble_averages_probabilities():
    first, second = make_decoder(vocab_size=4, seed=1), make_decoder(vocab_size=4, rnn=6, layers=2, seed=2)
    features = torch.randn(3, 4).double()
    tokens = torch.tensor([5, 5, 5])
    with torch.no_grad():
        states = EnsembleState((first.start(features), second.start(features)))
        logprobs, state = ensemble_step([first.step, second.step])(tokens, states)
        mean = (first.step(tokens, states.states[0])[0].exp() + second.step(tokens, states.states[1])[0].exp()) / 2
    torch.testing.assert_close(logprobs.exp(), mean)
    assert [len(own.h) for own in state.states] == [1, 2]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"beam_size": 0}, "beam_size 0"),
        ({"beam_size": 3, "n_best": 4}, "n_best 4"),
        ({"beam_size": 4, "groups": 3}, "groups 3"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_k": -1}, "top_k -1"),
        ({"length_penalty": math.nan}, "length_penalty nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(wrong, named):
    with pytest.raises(InputError, match=named):
        SearchOptions(**wrong)


def test_only_words_can_be_suppressed():
    decoder = make_decoder()
    with pytest.raises(InputError, match="suppress 6"):
        run(decoder, torch.randn(1, 4).double(), SearchOptions(suppress=(6,)))
