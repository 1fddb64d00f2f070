"""Where decoding tokens are computed: beside the prompts in one pass (a CPU), or by graphs of their own (a GPU)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from graftwork.serving.engine.batch import Chunk
from graftwork.serving.engine.kv import KvStore
from graftwork.serving.engine.sites import Forward
from graftwork.serving.engine.slots import LoadedAdapter

if TYPE_CHECKING:
    from graftwork.serving.engine.runner import Runner


class DecodeInputs(Protocol):
    """Packed tokens of a pass, as the model takes them."""

    @property
    def ids_1T(self) -> torch.Tensor: ...
    @property
    def positions_1T(self) -> torch.Tensor: ...


class DecodePath(Protocol):
    """Decodes in its own way. The engine's thread alone uses it."""

    def forward_of(self, module: torch.nn.Module) -> Forward:
        """What computes a linear's own result; called once for each before `attach`."""

    def attach(self, runner: "Runner", kv: KvStore, *, max_batch: int, max_rank: int) -> None:
        """Sets up the device's memory."""

    def warm_up(self) -> None:
        """Does what would slow the first requests down."""

    def bring(self, move: Callable[[], LoadedAdapter]) -> LoadedAdapter:
        """Calls `move`, which copies an adapter to the device; the copy may still be under way afterwards."""

    def wait_uploads(self, adapters: Sequence[LoadedAdapter | None]) -> None:
        """Makes the device's next work wait for the copies of these adapters."""

    def supports(self, weights: LoadedAdapter | None) -> bool:
        """Whether requests of this adapter can be decoded here; others are computed beside the prompts."""

    def logits(self, chunks: Sequence[Chunk], adapters: Sequence[LoadedAdapter | None]) -> torch.Tensor:
        """Logits [N, V] after the one token of each chunk; valid until the next call. Settles the adapters."""

    def forget(self, version: str) -> None:
        """Drops references to a freed adapter."""


def path_for(device: torch.device) -> DecodePath | None:
    """The device's own path; None on a CPU. Triton is imported on CUDA alone."""
    if device.type != "cuda":
        return None
    from graftwork.serving.engine.cuda.decode import GraphDecode

    return GraphDecode(device)
