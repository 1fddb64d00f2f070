"""An engine replica in this process, without Ray."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from graftwork.prompts.render import Message
from graftwork.serving.engine.request import SamplingParams
from graftwork.serving.messages import ArmAnswer, ArmRequest, Question
from graftwork.serving.replica import EngineReplica
from graftwork.serving.spec import ArmSpec, ServeSpec


@asynccontextmanager
async def replica_of(base: Path, root: Path, max_seq_len: int = 128) -> AsyncIterator[EngineReplica]:
    """As Ray Serve makes one."""
    spec = ServeSpec.model_validate(
        {
            "base": str(base),
            "root": str(root),
            "quant": {"kind": "none", "dtype": "float32"},
            "engine": {"max_seq_len": max_seq_len},
        }
    )
    replica = EngineReplica.__new__(EngineReplica)
    await replica.__init__(spec.model_dump(mode="json"))  # type: ignore[misc]
    try:
        async with asyncio.timeout(30):
            yield replica
    finally:
        await asyncio.to_thread(replica.stop)


HELLO = (Message("user", "Hello"),)


def ask(
    request_id: str, question: Question = HELLO, *, sampling: SamplingParams | None = None, n: int = 1, **arm: Any
) -> ArmRequest:
    """A request to the base with at most 6 tokens, or to an arm with these keys."""
    spec = ArmSpec.model_validate({"name": "base", "max_new_tokens": 6, **arm})
    return ArmRequest(spec, question, request_id, sampling or SamplingParams(), n=n)


async def answer(replica: EngineReplica, request: ArmRequest) -> ArmAnswer:
    """The one answer."""
    (found,) = await replica.choices(request)
    return found
