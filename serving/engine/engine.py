"""The engine: one base model, many adapters, many requests decoded together in one thread."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from graftwork.serving.engine.types import EngineStats, GenerateRequest, SlotState, TokenEvent
from graftwork.serving.spec import EngineSpec


class Engine:
    """Decodes requests for the base and for every loaded adapter in one batch. Lives in one process, runs in its own thread.

    model: a loaded transformers decoder (`AutoModelForCausalLM`), on `device`, in eval mode; the engine wraps its linears.
    decode: token ids to text, needed only for requests with stop strings.
    """

    def __init__(
        self, model: Any, spec: EngineSpec, device: str, decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        raise NotImplementedError

    def load_adapter(self, version: str, folder: Path) -> None:
        """Reads a PEFT folder into a slot. ArtifactError names the key and rule of anything that cannot be served."""
        raise NotImplementedError

    def retire_adapter(self, version: str) -> None:
        """Takes no new requests for `version`; its slot is freed when its last request ends."""
        raise NotImplementedError

    def adapters(self) -> list[SlotState]:
        """Loaded versions, oldest first."""
        raise NotImplementedError

    def submit(self, request: GenerateRequest, on_event: Callable[[TokenEvent], None]) -> None:
        """Queues a request (any thread). `on_event` is called in the engine's thread and must not block.

        Raises DataError (prompt empty, too long, token id out of range, bad sampling value, id in use) or
        ArtifactError (adapter not loaded or retired) before anything is queued.
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        """Ends a request with finish_reason="cancelled" before the next step; unknown ids are ignored."""
        raise NotImplementedError

    def start(self) -> None:
        """Starts the engine's thread."""
        raise NotImplementedError

    def stop(self) -> None:
        """Cancels what is queued or running, ends the thread and unwraps the model."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Counters and state now (any thread)."""
        raise NotImplementedError
