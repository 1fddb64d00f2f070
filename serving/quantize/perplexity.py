"""Perplexity of a text under one model, in strided windows: exp of the mean nats of each token but the first.

Recipe: the text's ids are read in windows of `window` tokens that start `stride` apart. A window scores the tokens that
no earlier one has scored; the tokens before them are context. So each token but the text's first is scored once, with
at least window - stride tokens of context from the second window on. (The strided form in transformers' guide
"Perplexity of fixed-length models"; it also averages over tokens and not over windows, so that a short last window
weighs what it holds.) Logits are taken to fp32 before the softmax. Legend: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Logits = Callable[[torch.Tensor], torch.Tensor]
"""ids [1, T] -> logits [1, T, V]"""


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` in one forward pass; those from `first` on are scored."""

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Perplexity:
    """The result over `tokens` scored tokens."""

    nats: float
    """Mean negative log-likelihood of a token."""
    tokens: int

    @property
    def value(self) -> float:
        return math.exp(self.nats)


def windows(tokens: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over a text of at least two tokens."""
    scored = 1  # nothing predicts the first token
    for start in range(0, tokens, stride):
        stop = min(start + window, tokens)
        yield Window(start, stop, scored)
        scored = stop
        if stop == tokens:
            return


def perplexity(ids: Sequence[int], logits: Logits, *, window: int, stride: int) -> Perplexity:
    """Of the text `ids`. `window` must not pass the longest sequence that the model takes."""
    assert len(ids) >= 2, "a text of one token predicts nothing"
    assert 1 <= stride <= window, f"stride={stride} skips tokens between windows of {window}"
    nats = 0.0
    for one in windows(len(ids), window, stride):
        ids_1T = torch.tensor([ids[one.start : one.stop]])
        nats += _nats(ids_1T, logits(ids_1T), one.first - one.start)
    return Perplexity(nats / (len(ids) - 1), len(ids) - 1)


def _nats(ids_1T: torch.Tensor, logits_1TV: torch.Tensor, first: int) -> float:
    """Summed negative log-likelihood of the tokens from `first` on: position t - 1 predicts token t."""
    predicted_TV = logits_1TV[0, first - 1 : -1].float()
    targets_T = ids_1T[0, first:].to(predicted_TV.device)
    return float(torch.nn.functional.cross_entropy(predicted_TV, targets_T, reduction="sum"))
