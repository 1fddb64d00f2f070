"""The embedder's own Serve deployment: a process beside the engines, so that no decode step waits for it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from graftwork.embedding import Embedded, Embedder, EmbedderSpec, TextTooLong, resolve_embedder
from graftwork.serving.api_error import bad_request
from graftwork.serving.arms import Dump

T = TypeVar("T")


class EmbedderReplica:
    """Turns texts into vectors, one call at a time: each call is a batch already."""

    async def __init__(self, spec: Dump) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._spec = EmbedderSpec.model_validate(spec)
        self._thread = ThreadPoolExecutor(1, "embed")
        self._embedder: Embedder = await self._run(self._load)
        await self._run(partial(self._embedder.embed, ["ready"]))

    async def embed(self, texts: list[str]) -> Embedded:
        """Vectors in the order of the texts. Raises ApiError 400 for a text that is too long."""
        try:
            return await self._run(partial(self._embedder.embed, texts))
        except TextTooLong as error:
            message = f"input: {error.subject} has {error.problem}; {error.rule}. {error.hint.capitalize()}."
            raise bad_request(message, param="input", code="context_length_exceeded") from None

    def _load(self) -> Embedder:
        import torch

        torch.set_num_threads(max(1, int(self._spec.num_cpus)))
        return Embedder(resolve_embedder(self._spec))

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
