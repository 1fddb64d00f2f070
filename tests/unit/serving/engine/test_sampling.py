"""Chosen tokens: exact where greedy, distributed as transformers' own processors say where drawn.

transformers is the independent source for every parameter but OpenAI's two penalties, whose formula stands in the test.
"""

from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import scipy.stats
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graftwork.serving.engine.grammar import Grammar, MaskWords, Matcher
from graftwork.serving.engine.logits_processors import process_logits
from graftwork.serving.engine.request import SamplerState, SamplingParams, choice_seed
from graftwork.serving.engine.sampling import NARROW, WIDE, SampledToken, choose, draw

VOCAB = 60
PROMPT = (3, 7, 7, 11, 20)
ANSWER = (7, 30, 30, 31, 30)


def some_logits(rows: int = 1, vocab: int = VOCAB, seed: int = 9) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def row(answer: Sequence[int] = (), stop_ids: frozenset[int] = frozenset(), **params: Any) -> SamplerState:
    """A row whose prompt is PROMPT and whose answer so far is `answer`."""
    made = SamplerState(SamplingParams(**params), PROMPT, stop_ids)
    for token in answer:
        made.take(token)
    return made


def reference(logits_V: torch.Tensor, params: SamplingParams, ids: Sequence[int] = PROMPT) -> torch.Tensor:
    """Probabilities by transformers' processors, in the order of its `generate`."""
    chain = LogitsProcessorList()
    if params.logit_bias:
        chain.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature:
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    return torch.softmax(chain(torch.tensor([list(ids)]), logits_V[None].clone()), -1)[0]


@pytest.mark.parametrize(
    ("params", "vocab"),
    [
        ({"temperature": 1.0}, 1000),  # several blocks, the last one not full
        ({"temperature": 1.0}, VOCAB),
        ({"temperature": 0.7, "top_k": 5}, VOCAB),
        ({"temperature": 1.3, "top_p": 0.8}, VOCAB),
        ({"temperature": 0.9, "top_k": 12, "top_p": 0.6}, VOCAB),
        ({"temperature": 1.0, "top_p": 1e-6}, VOCAB),
        ({"temperature": 5.0, "top_k": 1}, VOCAB),
        ({"temperature": 1.5, "min_p": 0.1}, VOCAB),
        ({"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05}, VOCAB),
        ({"temperature": 1.0, "repetition_penalty": 1.7, "logit_bias": ((3, 2.0), (40, -4.0))}, VOCAB),
    ],
)
def test_drawn_tokens_follow_the_reference_distribution(params: dict[str, Any], vocab: int) -> None:
    """Chi-square over 8,000 places of one request's stream; p > 0.001 with this seed."""
    draws, sampling = 8000, SamplingParams(seed=5, **params)
    logits_V = some_logits(vocab=vocab)[0]
    expected_V = reference(logits_V, sampling).numpy()
    counts_V = numpy.bincount(draw_many(logits_V, sampling, draws), minlength=vocab)
    assert (counts_V[expected_V == 0] == 0).all(), "a token was drawn that the cut forbids"
    order = expected_V.argsort()[::-1]
    groups = numpy.minimum(numpy.arange(vocab), int((expected_V * draws >= 5).sum()) - 1)  # the rare ones are one class
    observed, expected = (
        numpy.bincount(groups, weights=values[order]) for values in (counts_V, expected_V.astype("f8"))
    )
    if len(observed) > 1:
        assert scipy.stats.chisquare(observed, expected / expected.sum() * draws).pvalue > 0.001


def draw_many(logits_V: torch.Tensor, sampling: SamplingParams, draws: int) -> list[int]:
    """The tokens of places 0 to `draws` of one request, all with the same logits and tokens before."""
    rows = [SamplerState(sampling, PROMPT) for _ in range(draws)]
    for place, one in enumerate(rows):
        one.place = place
    return [choice.token_id for choice in choose(logits_V.repeat(draws, 1), rows)]


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    scores_BV = some_logits(2)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + ANSWER]), scores_BV[:1].clone())
    untouched = scores_BV[1].clone()
    process_logits(scores_BV, [row(ANSWER, repetition_penalty=penalty), row()])
    assert torch.equal(scores_BV[0], expected[0])
    assert torch.equal(scores_BV[1], untouched)


def test_frequency_and_presence_penalties_count_the_answer_alone() -> None:
    """The OpenAI API: mu[j] - c[j] * frequency - (c[j] > 0) * presence, c over the tokens sampled before."""
    logits_BV = some_logits()
    counts_V = torch.bincount(torch.tensor(ANSWER), minlength=VOCAB)
    expected = logits_BV - 0.4 * counts_V - 0.7 * (counts_V > 0)
    process_logits(logits_BV, [row(ANSWER, frequency_penalty=0.4, presence_penalty=0.7)])
    assert torch.allclose(logits_BV, expected, atol=1e-6)
    assert counts_V[PROMPT[0]] == 0


def test_a_long_answer_is_counted_whole() -> None:
    answer = [n % 50 for n in range(333)]
    logits_BV = some_logits()
    expected = logits_BV - 0.01 * torch.bincount(torch.tensor(answer), minlength=VOCAB)
    process_logits(logits_BV, [row(answer, frequency_penalty=0.01)])
    assert torch.allclose(logits_BV, expected, atol=1e-5)


def test_bias_and_held_back_stop_ids_are_those_of_transformers() -> None:
    ids = torch.tensor([PROMPT + ANSWER])
    logits_BV = some_logits()
    expected = SequenceBiasLogitsProcessor({(4,): 7.5, (5,): -100.0})(ids, logits_BV.clone())
    stop = MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, [2, 9], device="cpu")
    expected = stop(ids, expected)
    process_logits(logits_BV, [row(ANSWER, frozenset({2, 9}), logit_bias=((4, 7.5), (5, -100.0)), min_new_tokens=6)])
    assert torch.equal(logits_BV, expected)
    later_BV = some_logits()
    process_logits(later_BV, [row([*ANSWER, 1], frozenset({2, 9}), min_new_tokens=6)])
    assert torch.equal(later_BV, some_logits()), "six tokens are there: the stop ids are free"


class Only(Grammar):
    """A grammar that allows these tokens."""

    def __init__(self, *allowed: int) -> None:
        self.allowed = allowed

    def matcher(self) -> "OnlyMatcher":
        return OnlyMatcher(self.allowed)


class OnlyMatcher(Matcher):
    """An answer of such tokens."""

    problem, finished = None, False

    def __init__(self, allowed: Sequence[int]) -> None:
        self.allowed = allowed

    def fill(self, words_W: MaskWords) -> None:
        for token in self.allowed:
            words_W[token // 32] |= numpy.array(1 << token % 32, numpy.uint32).astype(numpy.int32)

    def take(self, token_id: int) -> None:
        assert token_id in self.allowed


def test_the_grammars_mask_holds_for_its_row_alone() -> None:
    logits_BV = some_logits(4)
    before = logits_BV.clone()
    allowed = (1, 31, 32, 59)
    drawn = SamplingParams(temperature=1.0, seed=1)
    rows = [
        SamplerState(SamplingParams()),
        SamplerState(SamplingParams(), grammar=Only(*allowed)),
        SamplerState(drawn),
        SamplerState(drawn),
    ]
    chosen = choose(logits_BV, rows)
    assert chosen[0].token_id == int(before[0].argmax())
    assert chosen[1].token_id == allowed[int(before[1, list(allowed)].argmax())]
    assert torch.equal(logits_BV[[0, 2, 3]], before[[0, 2, 3]])
    masked = [SamplerState(SamplingParams(temperature=9.0, seed=n), grammar=Only(*allowed)) for n in range(40)]
    assert {choice.token_id for choice in choose(before[:1].repeat(40, 1), masked)} == set(allowed)


def test_a_grammar_that_allows_nothing_ends_its_row_alone() -> None:
    chosen = choose(some_logits(2), [SamplerState(SamplingParams(), grammar=Only()), SamplerState(SamplingParams())])
    assert [choice.error for choice in chosen] == ["no token may come next", None]


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.5, "top_k": 3, "seed": 8},
    {"temperature": 1.2, "top_p": 0.9, "seed": 8, "logprobs": 3},
    {"temperature": 1.2, "min_p": 0.01, "seed": 9, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.4, "logprobs": 0},
    {"temperature": 3.0, "top_k": 1500, "seed": 3},  # more than are looked at at first
    {"temperature": 3.0, "top_p": 0.99, "seed": 4},
]


def test_rows_do_not_disturb_each_other() -> None:
    logits_BV = some_logits(len(MIXED), 2000, seed=1)
    together = choose(logits_BV.clone(), [row(ANSWER, **one) for one in MIXED])
    alone = [choose(logits_BV[n : n + 1].clone(), [row(ANSWER, **one)])[0] for n, one in enumerate(MIXED)]
    assert together == alone
    assert together[0] == SampledToken(int(logits_BV[0].argmax()))


@pytest.mark.parametrize(
    ("params", "looked_at"),
    [
        ({"top_k": 1500}, NARROW),
        ({"top_p": 0.8}, NARROW),
        ({"min_p": 0.1}, NARROW),
        ({"top_k": 1800, "top_p": 0.9}, NARROW),
        ({"top_k": 2600}, WIDE),
        ({"top_p": 0.99}, WIDE),
    ],
)
def test_cuts_that_keep_more_than_is_sorted_first_are_exact(params: dict[str, Any], looked_at: int) -> None:
    """A flat distribution over 3,000 tokens: none is drawn that the cut forbids, and the late ones have their share."""
    draws, vocab = 1000, 3000
    logits_V = some_logits(vocab=vocab, seed=3)[0] * 0.2
    sampling = SamplingParams(temperature=1.0, seed=2, **params)
    probs_V = reference(logits_V, sampling)
    assert looked_at < int((probs_V > 0).sum()) < vocab
    counts_V = torch.bincount(torch.tensor(draw_many(logits_V, sampling, draws)), minlength=vocab)
    assert not counts_V[probs_V == 0].any()
    late = logits_V.argsort(descending=True)[looked_at:]
    expected = float(probs_V[late].sum())
    assert float(counts_V[late].sum()) / draws == pytest.approx(expected, abs=4 * (expected / draws) ** 0.5)


def test_logprobs_are_those_of_the_model_itself() -> None:
    logits_BV = some_logits(3)
    expected_BV = torch.log_softmax(logits_BV, -1)
    rows = [
        row(temperature=0.3, top_k=2, seed=1, logprobs=0),
        row(logprobs=4, logit_bias=((11, 100.0),)),
        row(),
    ]
    chosen = choose(logits_BV, rows)
    for number, choice in enumerate(chosen[:2]):
        assert choice.logprob == pytest.approx(float(expected_BV[number, choice.token_id]), abs=1e-5)
    best = expected_BV[1].topk(4)
    assert [token for token, _ in chosen[1].top] == best.indices.tolist()
    assert [logprob for _, logprob in chosen[1].top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert chosen[1].token_id == 11
    assert (chosen[0].top, chosen[2].logprob) == ((), None)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_with_logits_that_are_not_finite_are_marked_alone(poison: float) -> None:
    logits_BV = some_logits(4)
    logits_BV[1, 4] = poison
    logits_BV[3, 4] = poison
    grammar = Only(1, 2)  # hides token 4, not the fact that the model failed
    rows = [SamplerState(SamplingParams(temperature=1.0, top_p=0.9, seed=n)) for n in range(3)]
    chosen = choose(logits_BV, [*rows, SamplerState(SamplingParams(), grammar=grammar)])
    assert [choice.error is None for choice in chosen] == [True, False, True, False]


def test_the_coldest_temperature_is_greedy_and_nothing_overflows() -> None:
    logits_BV = some_logits(2) * 1e4
    chosen = choose(logits_BV.clone(), [row(temperature=1e-300, seed=1), row(temperature=1e-3, top_p=0.5, seed=1)])
    assert [choice.token_id for choice in chosen] == logits_BV.argmax(-1).tolist()


def test_a_seed_decides_and_without_one_requests_differ() -> None:
    flat_BV = torch.zeros(1, 50_000)

    def first(seed: int | None) -> int:
        return int(draw(flat_BV.clone(), [row(temperature=1.0, seed=seed)])[0])

    assert first(3) == first(3)
    assert len({first(seed) for seed in (3, 4, -3, choice_seed(3, 1), choice_seed(3, 2))}) == 5
    assert choice_seed(3, 0) == 3
    assert len({first(None) for _ in range(4)}) > 1


def test_uniform_numbers_are_uniform_over_places_and_over_seeds() -> None:
    one = row(temperature=1.0, seed=0)
    places = []
    for place in range(4000):
        one.place = place
        places.append(one.uniform())
    seeds = [row(temperature=1.0, seed=seed).uniform() for seed in range(4000)]
    for sample in (places, seeds):
        assert scipy.stats.kstest(sample, "uniform").pvalue > 0.01
        assert abs(numpy.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.05


def test_bf16_logits_are_taken() -> None:
    logits_BV = some_logits(2).bfloat16()
    chosen = choose(logits_BV, [row(), row(temperature=1.0, top_k=1)])
    assert [choice.token_id for choice in chosen] == logits_BV.float().argmax(-1).tolist()
