"""What a rerank by the served base makes of what was found, for a whole set of questions."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from graftwork.retrieval import Hit
from graftwork.serving.app import Endpoint, deploy
from graftwork.serving.rag.questions import Question
from graftwork.serving.rag.rerank import rerank
from graftwork.serving.rag.spec import RagSpec
from graftwork.serving.spec import ArmSpec, EngineSpec, ServeSpec

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
    assert spec.rerank is not None
    serve = ServeSpec(
        name=f"rag-{spec.name}"[:63], root=spec.root, base=spec.rerank.base, quant=spec.rerank.quant,
        engine=EngineSpec(max_seq_len=2048),
    )  # fmt: skip
    with deploy(serve, http=False) as endpoint:
        return asyncio.run(_reranked(spec, endpoint, found, questions, on_progress))


async def _reranked(
    spec: RagSpec, endpoint: Endpoint, found: Sequence[Sequence[Hit]], questions: Sequence[Question],
    on_progress: Callable[[int, int, str], None] | None,
) -> tuple[list[Sequence[Hit]], list[float]]:  # fmt: skip
    assert spec.rerank is not None
    candidates, gate, done = spec.rerank.candidates, asyncio.Semaphore(_TOGETHER), 0

    async def likelihood(arm: dict[str, Any], messages: Any, texts: Sequence[str], request_id: str) -> Any:
        return await endpoint.likelihood(ArmSpec.model_validate(arm), messages, texts, request_id)

    async def one(question: Question, hits: Sequence[Hit]) -> tuple[list[Hit], float]:
        nonlocal done
        async with gate:
            began = time.perf_counter()
            passages = [hit.passage for hit in hits[:candidates]]
            order = await rerank(question.text, passages, likelihood, candidates)
            took = (time.perf_counter() - began) * 1000
        done += 1
        if on_progress is not None:
            on_progress(done, len(questions), "rerank")
        return [Hit(passage, -float(rank)) for rank, passage in enumerate(order)], took

    pairs = await asyncio.gather(*(one(q, hits) for q, hits in zip(questions, found, strict=True)))
    return [ranked for ranked, _ in pairs], [took for _, took in pairs]
