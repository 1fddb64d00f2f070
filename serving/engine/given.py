"""How likely a given continuation is: its tokens are computed like a prompt's, and none is chosen.

The place before a token tells how probable the token is, so the scored places begin with the prompt's last one and end
before the continuation's last token, which is never computed. Legend: N scored places, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch

SCORED_A_STEP = 128
"""Scored places a step over all requests. Each has logits of the whole vocabulary: 25 MB together for 49,152 tokens."""


class ScoredContinuation:
    """What is known of one request's continuation. first: KV place of the prompt's last token."""

    def __init__(self, continuation: Sequence[int], first: int) -> None:
        self.first = first
        self._ids = tuple(continuation)
        self._logprobs = [math.nan] * len(self._ids)

    def scored_range(self, start: int, count: int) -> range:
        """The scored ones among `count` places from `start` on."""
        return range(max(start, self.first), start + count)

    def within(self, start: int, count: int, limit: int) -> int:
        """`count`, or the fewer tokens from `start` on that score at most `limit` places."""
        return min(count, max(self.first - start, 0) + limit)

    def take(self, places: range, logits_NV: torch.Tensor) -> None:
        """What the model says at these places; a preempted request tells some of them again."""
        index = slice(places.start - self.first, places.stop - self.first)
        ids_N1 = torch.tensor(self._ids[index], device=logits_NV.device)[:, None]
        scores_NV = logits_NV.float()
        told_N1 = scores_NV.gather(1, ids_N1) - scores_NV.logsumexp(-1, keepdim=True)
        self._logprobs[index] = told_N1[:, 0].tolist()

    @property
    def total(self) -> float:
        """Natural log of the continuation's probability once every place was taken; not finite if a logit was not."""
        return sum(self._logprobs)
