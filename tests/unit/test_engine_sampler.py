"""Sampling: the distribution that transformers defines, by each row's own seed, whatever runs beside it."""

from collections import Counter

import pytest
import torch

from graftwork.serving.engine.sampler import choose, new_generator
from graftwork.serving.engine.types import SamplingParams

DRAWS = 4000


def reference(logits_V: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The probabilities after transformers' own warpers, in its order."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores_1V = TemperatureLogitsWarper(sampling.temperature)(None, logits_V[None])
    if sampling.top_k:
        scores_1V = TopKLogitsWarper(sampling.top_k)(None, scores_1V)
    if sampling.top_p < 1:
        scores_1V = TopPLogitsWarper(sampling.top_p)(None, scores_1V)
    return torch.softmax(scores_1V, -1)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0, seed=0),
        SamplingParams(temperature=0.7, top_k=5, seed=1),
        SamplingParams(temperature=1.3, top_p=0.8, seed=2),
        SamplingParams(temperature=0.9, top_k=12, top_p=0.6, seed=3),
        SamplingParams(temperature=1.0, top_p=1e-6, seed=4),
        SamplingParams(temperature=5.0, top_k=1, seed=5),
    ],
)
def test_the_tokens_follow_the_reference_distribution(sampling: SamplingParams) -> None:
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(9)) * 2
    expected_V = reference(logits_V, sampling)
    generator = new_generator(sampling)
    rows = choose(logits_V.repeat(DRAWS, 1), [sampling] * DRAWS, [generator] * DRAWS)
    counts = Counter(choice.token_id for choice in rows)
    assert all(expected_V[token] > 0 for token in counts), "a token was drawn that the cut forbids"
    seen_V = torch.tensor([counts[token] / DRAWS for token in range(40)])
    spread_V = (expected_V * (1 - expected_V) / DRAWS).sqrt()
    assert ((seen_V - expected_V).abs() <= 5 * spread_V + 1e-9).all()  # 5 sigma each


def test_greedy_and_sampled_rows_mix_and_do_not_disturb_each_other() -> None:
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=7),
        SamplingParams(temperature=0.5, top_k=3, seed=8),
    ]
    sampling = params * 2
    together = choose(logits_BV, sampling, [new_generator(one) for one in sampling])
    alone = [choose(logits_BV[n : n + 1], [one], [new_generator(one)])[0] for n, one in enumerate(sampling)]
    assert together == alone
    assert [together[n].token_id for n in (0, 3)] == logits_BV[[0, 3]].argmax(-1).tolist()


def test_logprobs_are_those_of_the_uncut_model() -> None:
    logits_BV = torch.randn(2, 30)
    sampling = [SamplingParams(temperature=0.3, top_k=2, seed=1), SamplingParams()]
    chosen = choose(logits_BV, sampling, [new_generator(one) for one in sampling])
    expected = torch.log_softmax(logits_BV, -1)
    for row, choice in enumerate(chosen):
        assert choice.logprob == pytest.approx(float(expected[row, choice.token_id]), abs=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_with_logits_that_are_not_finite_are_marked_alone(poison: float) -> None:
    logits_BV = torch.randn(3, 30)
    logits_BV[1, 4] = poison
    sampling = [SamplingParams(temperature=1.0, top_p=0.9, seed=n) for n in range(3)]
    chosen = choose(logits_BV, sampling, [new_generator(one) for one in sampling])
    assert [choice.valid for choice in chosen] == [True, False, True]


def test_without_a_seed_two_requests_differ() -> None:
    logits_BV = torch.zeros(1, 50_000)
    sampling = SamplingParams(temperature=1.0)
    draws = {choose(logits_BV, [sampling], [new_generator(sampling)])[0].token_id for _ in range(4)}
    assert len(draws) > 1
