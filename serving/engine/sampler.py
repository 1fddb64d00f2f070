"""Chooses the next token of each row: greedy and sampled rows in one batch, each sampled row by its own seed.

Temperature scales the logits, then top-k, then top-p cut the distribution (the order of transformers' generate), then
one uniform number of the row's own generator picks by inverse transform. A row's token depends on nothing but its own
logits and generator. Legend: B rows, V vocabulary, C candidates kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftwork.serving.engine.types import SamplingParams


@dataclass(frozen=True)
class Choice:
    """One row's token. `logprob` is None and `valid` False where the row's logits are not finite."""

    token_id: int
    logprob: float | None
    valid: bool


def new_generator(sampling: SamplingParams) -> torch.Generator | None:
    """The random stream of one request, on the CPU; None for greedy."""
    if sampling.temperature == 0:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(
    logits_BV: torch.Tensor, sampling: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> list[Choice]:
    """Next tokens and their log probabilities (temperature 1, nothing cut)."""
    logprobs_BV = torch.log_softmax(logits_BV.float(), dim=-1)
    tokens_B = logprobs_BV.argmax(dim=-1)
    drawn = [row for row, generator in enumerate(generators) if generator is not None]
    valid_B = torch.isfinite(logprobs_BV.gather(1, tokens_B[:, None])[:, 0])  # nan wins every argmax
    if drawn:
        healthy = [row for row, fine in zip(drawn, valid_B[drawn].tolist(), strict=True) if fine]
        if healthy:
            tokens_B[healthy] = _draw(logits_BV[healthy].float(), healthy, sampling, generators)
    chosen_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
    rows = zip(tokens_B.tolist(), chosen_B.tolist(), valid_B.tolist(), strict=True)
    return [Choice(token, logprob if valid else None, valid) for token, logprob, valid in rows]


def _draw(
    logits_BV: torch.Tensor,
    rows: Sequence[int],
    sampling: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
) -> torch.Tensor:
    """Tokens of the sampled rows. Uncut and cut rows are drawn apart: each is its own order of candidates."""
    chosen = [sampling[row] for row in rows]
    device = logits_BV.device
    temperature_B = torch.tensor([params.temperature for params in chosen], device=device)
    uniform_B = torch.stack([torch.rand((), generator=generators[row], dtype=torch.float64) for row in rows]).to(device)
    scaled_BV = logits_BV / temperature_B[:, None]
    tokens_B = torch.empty(len(rows), dtype=torch.long, device=device)
    cut = [n for n, params in enumerate(chosen) if params.top_k or params.top_p < 1]
    whole = [n for n in range(len(rows)) if n not in cut]
    if whole:
        tokens_B[whole] = _pick(torch.softmax(scaled_BV[whole], dim=-1), uniform_B[whole])
    if cut:
        params = [chosen[n] for n in cut]
        most = min(max(one.top_k or logits_BV.shape[1] for one in params), logits_BV.shape[1])
        sorted_BC, order_BC = scaled_BV[cut].topk(most, dim=-1)
        spots_B = _pick(_cut(sorted_BC, params), uniform_B[cut])
        tokens_B[cut] = order_BC.gather(1, spots_B[:, None])[:, 0]
    return tokens_B


def _cut(sorted_BC: torch.Tensor, chosen: Sequence[SamplingParams]) -> torch.Tensor:
    """Probabilities after top-k and top-p, best first; the token that crosses top_p is kept."""
    device, count = sorted_BC.device, sorted_BC.shape[1]
    top_k_B = torch.tensor([params.top_k or count for params in chosen], device=device)
    top_p_B = torch.tensor([params.top_p for params in chosen], device=device)
    place_C = torch.arange(count, device=device)
    kept_BC = sorted_BC.masked_fill(place_C >= top_k_B[:, None], float("-inf"))
    probs_BC = torch.softmax(kept_BC, dim=-1)
    before_BC = probs_BC.cumsum(-1) - probs_BC
    return probs_BC.masked_fill((before_BC >= top_p_B[:, None]) & (place_C > 0), 0.0)


def _pick(probs_BC: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Inverse transform: the first candidate whose cumulative probability exceeds uniform * total. float64 sums."""
    cumulative_BC = probs_BC.double().cumsum(-1)
    target_B1 = (uniform_B * cumulative_BC[:, -1])[:, None]
    spot_B = torch.searchsorted(cumulative_BC, target_B1, right=True)[:, 0]
    last_B = (probs_BC > 0).to(torch.int8).flip(-1).argmax(-1)  # rounding may step past the last candidate
    return torch.minimum(spot_B, probs_BC.shape[1] - 1 - last_B)
