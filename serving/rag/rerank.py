"""Passages in the order of how likely the base finds the question behind each: query likelihood (Ponte & Croft 1998),
with a language model as in UPR (arXiv 2204.07496). The base that answers is the one that reads: nothing else is loaded.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from graftwork.prompts.render import Passage, rerank_prompt
from graftwork.serving.spec import ArmSpec

Likelihood = Callable[[dict[str, Any], list[dict[str, str]], Sequence[str], str], Awaitable[list[dict[str, Any]]]]
"""`EngineReplica.likelihood`: (arm dump, messages, continuations, request id)."""
_numbers = itertools.count()
_BASE = ArmSpec(name="rerank", max_new_tokens=None).model_dump(mode="json")


async def rerank(question: str, passages: Sequence[Passage], likelihood: Likelihood, k: int) -> tuple[Passage, ...]:
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


async def _score(question: str, passage: Passage, likelihood: Likelihood, request_id: str) -> float:
    """log P(question | passage) in nats. The questions compared are one text, so no length weighs in."""
    messages = [asdict(message) for message in rerank_prompt(passage)]
    (said,) = await likelihood(_BASE, messages, [question], request_id)
    return float(said["logprob"])
