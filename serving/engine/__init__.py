"""Protocol of an inference engine, and `open_engine`, which makes the engine that a spec names.

The replica, the adapter cache and the measurements use the protocol only.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from graftwork.base.load import ResolvedBase, load
from graftwork.prompts.template import Template
from graftwork.serving.engine.request import EngineStats, GenerateRequest, SlotState, TokenEvent
from graftwork.serving.spec import ServeSpec


class Engine(Protocol):
    """Decodes requests for one base and its loaded adapters, beside its caller. All methods from any thread.

    A request is pinned to its adapter version at `submit`: retiring it later never changes a running answer.
    """

    def load_adapter(self, version: str, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Reads a PEFT folder, blocks until the version can be used, and returns the bytes that it takes.

        digests: sha256 by file name, checked. A loaded version is left as it is, and un-retired. Raises ArtifactError
        naming what cannot be served.
        """

    def check_adapter(self, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Reads and checks a PEFT folder as `load_adapter` does, without keeping it."""

    def retire_adapter(self, version: str) -> None:
        """Takes no new requests for `version`; freed when its last request ends. ArtifactError where not loaded."""

    def adapters(self) -> list[SlotState]:
        """Loaded versions."""

    def max_request_tokens(self, version: str | None) -> int:
        """Prompt and answer tokens together that a request of a loaded version, or of the base, may have."""

    def submit(self, request: GenerateRequest, on_event: Callable[[TokenEvent], None]) -> None:
        """Queues a request: an answer to be generated, or (`GenerateRequest.continuation`) one to be scored. `on_event`
        is called in a thread of the engine, or in that of `stop`, and must not block.

        Raises DataError or ArtifactError before anything is queued; what goes wrong later ends the request with an
        event.
        """

    def cancel(self, request_id: str) -> None:
        """Ends a request with finish_reason="cancelled"; unknown ids are ignored."""

    def start(self) -> None:
        """Begins to decode. Called once."""

    def stop(self) -> None:
        """Cancels what is queued or running and ends. Blocks until that is done. A second call does nothing."""

    def alive(self) -> bool:
        """Return True while requests are decoded: False before `start`, after `stop`, and once the engine has died."""

    def stats(self) -> EngineStats:
        """Counters since the start and the state now."""


def open_engine(spec: ServeSpec, base: ResolvedBase, template: Template) -> tuple[Engine, str]:
    """The engine, not started, and how it holds the base and why. Blocks. Raises UserError."""
    if spec.engine.kind == "vllm":
        from graftwork.serving.vllm.engine import create_vllm

        form = f"{spec.quant.kind} by bitsandbytes" if spec.quant.is_packed else "plain"
        reason = f"engine=vllm (asked for), tensor_parallel_size={spec.engine.tensor_parallel_size}; weights={form}"
        return create_vllm(base, spec.quant, spec.engine), reason
    device = "cuda:0" if spec.gpus else "cpu"
    if device == "cpu":
        import torch

        # The engine's thread alone has helpers: OpenMP keeps those of every thread that ever had some, and once they
        # are more than the CPUs they sleep at each wait: a step of 16 rows on two cores took 123 ms, not 96.
        torch.set_num_threads(1)
    loaded = load(base, spec.quant, device=device, purpose="serve")
    limits = spec.engine.with_({"num_threads": spec.engine.num_threads or max(1, int(spec.num_cpus))})
    from graftwork.serving.engine.engine import NativeEngine  # torch: only here, so that driver and ingress go without

    return NativeEngine(loaded.model, limits, device, template.decode), loaded.reason
