"""Passages in the order of how likely the base finds the question behind each: query likelihood (Ponte & Croft 1998),
with a language model as in UPR (arXiv 2204.07496). The base that answers is the one that reads: nothing else is loaded.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

from graftwork.prompts.render import Message, Passage, rerank_prompt
from graftwork.serving.messages import Likelihood
from graftwork.serving.spec import ArmSpec

Score = Callable[[ArmSpec, tuple[Message, ...], Sequence[str], str], Awaitable[list[Likelihood]]]
"""`EngineReplica.likelihood`: (arm, messages, continuations, request id)."""
_numbers = itertools.count()
_BASE = ArmSpec(name="rerank", max_new_tokens=None)


async def rerank(question: str, passages: Sequence[Passage], likelihood: Score, k: int) -> tuple[Passage, ...]:
    """The k passages behind which the question is likeliest; equal ones as they stood. Raises ApiError.

    All candidates are asked about at once, as requests of their own. Cancelling the call ends them all.
    """
    request_id = f"rerank-{next(_numbers)}"
    try:
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(_score(question, passage, likelihood, f"{request_id}-{place}"))
                for place, passage in enumerate(passages)
            ]
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    ranked = sorted(zip(asked, passages, strict=True), key=lambda pair: -pair[0].result())
    return tuple(passage for _, passage in ranked[:k])


async def _score(question: str, passage: Passage, likelihood: Score, request_id: str) -> float:
    """log P(question | passage) in nats. The questions compared are one text, so no length weighs in."""
    (found,) = await likelihood(_BASE, tuple(rerank_prompt(passage)), [question], request_id)
    return found.logprob
