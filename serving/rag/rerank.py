"""Reranking of passages by the likelihood of the question after each: query likelihood (Ponte & Croft 1998) with a
language model, as in UPR (arXiv 2204.07496). The served base reads the passages: no other model is loaded.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from graftwork.prompts.render import Message, Passage, rerank_prompt
from graftwork.retrieval import Hit
from graftwork.serving.messages import Likelihood
from graftwork.serving.rag.questions import Question
from graftwork.serving.rag.spec import RagSpec
from graftwork.serving.spec import ArmSpec, EngineSpec, ServeSpec

if TYPE_CHECKING:
    from graftwork.serving.deploy import Endpoint

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


_TOGETHER = 4
"""Questions at a time: with 10 candidates each they fill a batch."""


def rerank_all(
    spec: RagSpec,
    found: Sequence[Sequence[Hit]],
    questions: Sequence[Question],
    on_progress: Callable[[int, int, str], None] | None,
) -> tuple[list[Sequence[Hit]], list[float]]:
    """The candidates of each question in the order of the base's likelihood, and the wall ms that each took.

    Deploys the spec's base on the initialised Ray for the time of the call.
    """
    from graftwork.serving.deploy import deploy  # which imports the replica, and the replica imports this module

    assert spec.rerank is not None
    serve = ServeSpec(
        name=f"rag-{spec.name}"[:63],
        root=spec.root,
        base=spec.rerank.base,
        quant=spec.rerank.quant,
        engine=EngineSpec(max_seq_len=2048),
    )
    with deploy(serve, http=False) as endpoint:
        return asyncio.run(_rerank_questions(spec, endpoint, found, questions, on_progress))


async def _rerank_questions(
    spec: RagSpec,
    endpoint: "Endpoint",
    found: Sequence[Sequence[Hit]],
    questions: Sequence[Question],
    on_progress: Callable[[int, int, str], None] | None,
) -> tuple[list[Sequence[Hit]], list[float]]:
    assert spec.rerank is not None
    candidates, gate, done = spec.rerank.candidates, asyncio.Semaphore(_TOGETHER), 0

    async def one(question: Question, hits: Sequence[Hit]) -> tuple[list[Hit], float]:
        nonlocal done
        async with gate:
            began = time.perf_counter()
            passages = [hit.passage for hit in hits[:candidates]]
            order = await rerank(question.text, passages, endpoint.likelihood, candidates)
            took = (time.perf_counter() - began) * 1000
        done += 1
        if on_progress is not None:
            on_progress(done, len(questions), "rerank")
        return [Hit(passage, -float(rank)) for rank, passage in enumerate(order)], took

    pairs = await asyncio.gather(*(one(q, hits) for q, hits in zip(questions, found, strict=True)))
    return [ranked for ranked, _ in pairs], [took for _, took in pairs]
