"""What captions have to say, may not say, begin with, and how long they are: against brute force and plain loops."""

import itertools
import math

import pytest
import torch
from test_attention_decoder import make_decoder as make_attention_decoder
from test_decoder import make_decoder
from test_search import DECODERS, all_captions, make_tables, repeats, run, said_once

from captioner.errors import InputError
from captioner.model.decoder import Decoder
from captioner.search import EnsembleState, SearchOptions, ensemble_step, search
from captioner.search.requirements import automaton_of

# Words, a choice of words, phrases, phrases that overlap, a phrase that repeats its word.
REQUIREMENTS = [
    (((2,),),),
    (((1,), (3,)),),
    (((1,),), ((3,),)),
    (((1, 2),),),
    (((1, 2), (3,)), ((2,),)),
    (((1, 2),), ((1, 3),)),
    (((1, 2),), ((2, 1),)),
    (((2, 2, 3),),),
]
RULES = [
    {},
    {"length_penalty": 1.0},
    {"max_words": 2},
    {"max_words": 3, "bad_endings": (3,), "no_immediate_repeat": True},
    {"max_words": 3, "repeatable": (1,)},
    {"prefix": (2,)},
    {"prefix": (3, 1), "max_words": 3, "length_penalty": 0.5},
    {"min_length": 3, "no_repeat_ngram": 2},
]


def says(tokens: tuple[int, ...], form: tuple[int, ...]) -> bool:
    return any(tokens[i : i + len(form)] == form for i in range(len(tokens)))


def is_allowed(tokens: tuple[int, ...], options: SearchOptions, max_length: int) -> bool:
    """By the meaning of the options, as their docstring has it."""
    if options.max_words and options.max_words < max_length and len(tokens) > options.max_words:
        return False
    met = all(any(says(tokens, form) for form in forms) for forms in options.require)
    begins = tokens[: len(options.prefix)] == options.prefix
    repeated = options.no_repeat_ngram > 0 and repeats(tokens, options.no_repeat_ngram)
    repeated |= options.no_immediate_repeat and any(a == b for a, b in itertools.pairwise(tokens))
    repeated |= bool(options.repeatable) and repeats(said_once(tokens, options), 1)
    ends_badly = bool(set(tokens[-1:]) & set(options.bad_endings))
    return met and begins and not repeated and not ends_badly and len(tokens) >= options.min_length


def rank(tokens: tuple[int, ...], logprob: float, options: SearchOptions, max_length: int) -> float:
    return logprob / min(len(tokens) + 1, max_length) ** options.length_penalty


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("require", REQUIREMENTS, ids=str)
def test_a_wide_beam_finds_the_likeliest_of_all_captions_that_say_it(require, rules):
    vocab_size, max_length = 3, 4
    model = make_tables(2, vocab_size, max_length, 2.0, seed=7)
    options = SearchOptions(beam_size=120, n_best=6, require=require, **rules)
    every = [all_captions(table, vocab_size, max_length) for table in model.tables]
    possible = [tokens for tokens in every[0] if is_allowed(tokens, options, max_length)]
    if not possible:  # then only what has to be said counts, and the length
        options = SearchOptions(
            beam_size=120, n_best=6, require=require, prefix=options.prefix, max_words=options.max_words
        )
        possible = [tokens for tokens in every[0] if is_allowed(tokens, options, max_length)]
    if not possible:
        with pytest.raises(InputError, match="words, and they have"):
            model.search(max_length, options)
        return
    for captions, hypotheses in zip(every, model.search(max_length, options), strict=True):
        expected = sorted(possible, key=lambda tokens: -rank(tokens, captions[tokens], options, max_length))[:6]
        assert [h.tokens for h in hypotheses] == expected
        assert [h.logprob for h in hypotheses] == pytest.approx([captions[tokens] for tokens in expected], abs=1e-5)


@pytest.mark.parametrize("beam_size", [1, 2, 3])
@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
@pytest.mark.parametrize("sharpness", [0.5, 5.0])
def test_each_bank_has_its_own_beams(sharpness, length_penalty, beam_size):
    """Plain loops: a bank is a number of missing words; END competes with what lacks nothing."""
    vocab_size, max_length, required = 4, 5, (1, 3)
    model = make_tables(4, vocab_size, max_length, sharpness, seed=3)
    options = SearchOptions(beam_size=beam_size, require=(((1,),), ((3,),)), length_penalty=length_penalty)
    every_end = length_penalty > 0 and beam_size > 1
    for table, (hypothesis,) in zip(model.tables, model.search(max_length, options), strict=True):
        live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        found: dict[tuple[int, ...], float] = {}
        for t in range(max_length):
            extended, ends = [], []
            for words, logprob in live:
                row = table[words].tolist()
                extended += [((*words, k + 1), logprob + row[k]) for k in range(vocab_size)]
                if set(required) <= set(words):
                    ends.append((words, logprob + row[vocab_size]))
            banks = {
                bank: sorted(
                    (one for one in extended if len(set(required) - set(one[0])) == bank), key=lambda one: -one[1]
                )
                for bank in range(min(len(required), max_length - t - 1) + 1)
            }
            best = sorted(banks[0] + ends, key=lambda one: -one[1])[:beam_size]
            found |= {
                words: logprob / (t + 1) ** length_penalty
                for words, logprob in ends
                if every_end or (words, logprob) in best
            }
            live = [one for bank in banks.values() for one in bank[:beam_size]]
        cut = live[:beam_size] if every_end else [one for one in best if len(one[0]) == max_length]
        found |= {words: logprob / max_length**length_penalty for words, logprob in cut}
        assert hypothesis.tokens == max(found, key=lambda words: found[words])


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("extra", [{}, {"max_words": 5}, {"prefix": (9, 9)}, {"bad_endings": (4, 5, 6, 7)}], ids=str)
def test_any_beam_finds_captions_that_say_it(network, beam_size, extra):
    decoder, features = network
    require = (((4,), (5,)), ((6, 7),), ((2,),))
    options = SearchOptions(beam_size=beam_size, n_best=beam_size, require=require, suppress=(4,), **extra)
    for hypotheses in run(decoder, features, options):
        for hypothesis in hypotheses:
            assert is_allowed(hypothesis.tokens, options, 7) and 4 not in hypothesis.tokens


@pytest.fixture(params=DECODERS)
def network(request):
    """A decoder and what it sees of 64 images."""
    return DECODERS[request.param]()


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(beam_size=3, n_best=3, require=(((4,), (5,)), ((6, 7),)), length_penalty=0.7),
        SearchOptions(beam_size=1, require=(((8,),),), max_words=5),
        SearchOptions(beam_size=2, prefix=(3, 3), no_immediate_repeat=True, min_length=4, max_words=6),
        SearchOptions(sample=True, n_best=2, prefix=(3, 1), max_words=4),
    ],
    ids=["beam", "greedy", "prefix", "sample"],
)
def test_a_batch_gives_what_single_images_give(options, network):
    decoder, features = network
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter *= 4 if isinstance(decoder, Decoder) else 1.5
    features, seeds = features[:24], list(range(24))
    batch = run(decoder, features, options, seeds=seeds)
    singles = [run(decoder, features[i : i + 1], options, seeds=seeds[i : i + 1])[0] for i in range(24)]
    assert [[h.tokens for h in image] for image in batch] == [[h.tokens for h in image] for image in singles]
    assert len({h.tokens for image in batch for h in image}) > 3  # the comparison means something
    for hypothesis in itertools.chain(*batch):
        assert is_allowed(hypothesis.tokens, SearchOptions(prefix=options.prefix, max_words=options.max_words), 7)
        assert hypothesis.finished or not options.max_words


@torch.no_grad()
def test_an_ensemble_that_has_to_say_something_finds_the_likeliest_of_all_captions_that_do():
    decoders = [make_attention_decoder(vocab_size=3, seed=seed) for seed in (1, 2)]
    grids = torch.randn(3, 5, 4).double()
    every = list(itertools.product(range(1, 4), repeat=3))
    labels, image = torch.tensor(every * 3), torch.arange(3).repeat_interleave(len(every))
    logprobs = torch.stack([decoder(grids, labels, image) for decoder in decoders]).logsumexp(0) - math.log(2)
    options = SearchOptions(beam_size=100, n_best=4, require=(((2,),), ((3,), (1,))))
    found = search(
        ensemble_step([decoder.step for decoder in decoders]),
        EnsembleState(tuple(decoder.start(grids) for decoder in decoders)),
        num_images=3,
        vocab_size=3,
        max_length=3,
        options=options,
    )
    for own, hypotheses in zip(logprobs.view(3, len(every), 4, 4), found, strict=True):
        captions = {}
        for ids, table in zip(every, own.tolist(), strict=True):
            words = [table[t][word - 1] for t, word in enumerate(ids)]
            captions[ids] = sum(words)
            captions |= {ids[:t]: sum(words[:t]) + table[t][3] for t in range(3)}
        captions = {ids: logprob for ids, logprob in captions.items() if is_allowed(ids, options, 3)}
        assert [h.tokens for h in hypotheses] == sorted(captions, key=lambda ids: -captions[ids])[:4]


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_prefix_is_what_it_is_whatever_the_rules_say(beam_size):
    decoder, features = make_decoder(vocab_size=6), torch.randn(5, 4).double()
    options = SearchOptions(beam_size=beam_size, prefix=(2, 2, 5), suppress=(2,), no_immediate_repeat=True, max_words=3)
    with torch.no_grad():
        expected = decoder(features, torch.tensor([[2, 2, 5]] * 5))[:, -4:]
    for (hypothesis,), table in zip(run(decoder, features, options), expected, strict=True):
        assert hypothesis.tokens == (2, 2, 5) and hypothesis.finished
        assert hypothesis.word_logprobs == pytest.approx([float(table[t][i]) for t, i in enumerate((1, 1, 4, 6))])


def test_at_most_so_many_words_is_brute_force_over_the_shorter_captions():
    model = make_tables(4, 3, 5, 0.3, seed=2)
    for max_words in range(1, 6):
        options = SearchOptions(beam_size=250, max_words=max_words)
        for table, (hypothesis,) in zip(model.tables, model.search(5, options), strict=True):
            captions = {ids: p for ids, p in all_captions(table, 3, 5).items() if is_allowed(ids, options, 5)}
            assert hypothesis.tokens == max(captions, key=lambda ids: captions[ids])


def test_missing_words_are_the_least_that_lead_there():
    """Breadth first over texts, without an automaton."""
    require = (((1, 2), (4,)), ((2, 3),), ((3,), (2, 2)))
    automaton = automaton_of(require, ())

    def lacks(text: tuple[int, ...]) -> int:
        for extra in range(9):
            for more in itertools.product((1, 2, 3, 4), repeat=extra):
                if all(any(says(text + more, form) for form in forms) for forms in require):
                    return extra
        raise AssertionError

    for length in range(5):
        for text in itertools.product((1, 2, 3, 4, 5), repeat=length):
            assert automaton.missing[automaton.after(text)] == lacks(text), text


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"require": (((1,),), ((2, 3),)), "max_words": 2}, "takes 3 words, and they have 2 at most"),
        ({"require": (((1,),),), "prefix": (2,) * 7}, "takes 8 words"),
        ({"require": (((1,),),), "suppress": (1,)}, "words that are never said"),
        ({"require": ((),)}, "without words"),
        ({"require": (((1,),),) * 9}, "9 requirements at once; expected at most 8"),
        ({"require": (((11,),),)}, "require 11; expected word ids from 1 to 10"),
        ({"prefix": (0,)}, "prefix 0"),
    ],
    ids=str,
)
def test_what_cannot_be_said_is_refused(wrong, told):
    decoder = make_decoder(vocab_size=10)
    with pytest.raises(InputError, match=told):
        run(decoder, torch.randn(1, 4).double(), SearchOptions(beam_size=2, **wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_words": 3, "min_length": 4},
        {"require": (((1,),),), "sample": True},
        {"require": (((1,),),), "beam_size": 4, "groups": 2},
    ],
    ids=str,
)
def test_contradictions_are_refused(wrong):
    with pytest.raises(InputError):
        SearchOptions(**wrong)
