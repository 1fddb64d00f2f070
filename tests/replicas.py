"""An engine replica in this process, without Ray."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from graftwork.serving.replica import EngineReplica
from graftwork.serving.spec import ArmSpec, ServeSpec


@asynccontextmanager
async def replica_of(base: Path, root: Path) -> AsyncIterator[EngineReplica]:
    """As Ray Serve makes one."""
    spec = ServeSpec.model_validate(
        {
            "base": str(base),
            "root": str(root),
            "quant": {"kind": "none", "dtype": "float32"},
            "engine": {"max_seq_len": 128},
        }
    )
    replica = EngineReplica.__new__(EngineReplica)
    await replica.__init__(spec.model_dump(mode="json"))  # type: ignore[misc]
    try:
        async with asyncio.timeout(30):
            yield replica
    finally:
        await asyncio.to_thread(replica.stop)


def arm(**changed: Any) -> dict[str, Any]:
    return ArmSpec(**{"name": "base", "max_new_tokens": 6, **changed}).model_dump(mode="json")
