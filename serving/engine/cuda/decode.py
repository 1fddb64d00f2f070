"""Decoding on a GPU: every step is one replay of a graph captured at the start, whatever adapters and rows take part.

Graphs are captured for 1, 2, 4, 8, ... rows up to `max_batch`, with adapters and without; a batch is padded up to one.
They read tokens, KV places and adapter slots from device memory (`inputs.py`, `table.py`), so adapters come and go and
KV rows move without another capture. Prompts run eagerly beside them, on torch's own path.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from graftwork.serving.engine.batch import Chunk
from graftwork.serving.engine.cuda.batch import DecodeBatch
from graftwork.serving.engine.cuda.deltas import TableDeltas
from graftwork.serving.engine.cuda.graphs import Capture, GraphCapture, Step, direct, reads_positions_on_host
from graftwork.serving.engine.cuda.inputs import StepInputs
from graftwork.serving.engine.cuda.kernels import rows as row_kernels
from graftwork.serving.engine.cuda.nf4 import DecodeLinears, Forward
from graftwork.serving.engine.cuda.table import SlotTable
from graftwork.serving.engine.cuda.uploads import Uploads
from graftwork.serving.engine.kv import KvStore
from graftwork.serving.engine.layers import DecodeLayers
from graftwork.serving.engine.runner import Runner
from graftwork.serving.engine.slots import LoadedAdapter

_log = logging.getLogger(__name__)


class GraphDecode:
    """The engine's `DecodePath` on CUDA. capture: how a step is kept; None takes graphs where the model allows them."""

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        self._device, self._capture = device, capture
        self._linears = DecodeLinears()
        self._uploads = Uploads(device)
        self._steps: dict[tuple[int, bool], Step] = {}

    def forward_of(self, module: torch.nn.Module) -> Forward:
        """The forward that the hook of a linear calls."""
        return self._linears.forward_of(module)

    def attach(self, runner: Runner, kv: KvStore, *, max_batch: int, max_rank: int) -> None:
        """Sets up the device memory that steps read."""
        self._runner, self._kv = runner, kv
        self._layers = DecodeLayers(runner.model, runner.dtype, row_kernels)
        self._buckets = row_buckets(max_batch)
        self._inputs = StepInputs(max_batch, kv.page_tokens, self._device)
        self._table = SlotTable(runner.sites.groups(), max_batch, max_rank, runner.dtype, self._device)
        if self._capture is None:
            moving = reads_positions_on_host(runner.config)
            if moving is not None:
                _log.warning("decoding without CUDA graphs: rope_type=%s reads the positions on the host", moving)
            self._capture = direct if moving is not None else GraphCapture()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures every graph, the largest first: the smaller ones fit into its memory."""
        for rows in reversed(self._buckets):
            for adapted in (False, True):
                self._inputs.fill([], [], rows)
                self._step(rows, adapted)

    def bring(self, move: Callable[[], LoadedAdapter]) -> LoadedAdapter:
        """Calls `move` on the side stream: the step that is under way goes on beside the copy."""
        return self._uploads.bring(move)

    def wait_uploads(self, adapters: Sequence[LoadedAdapter | None]) -> None:
        """Makes the step wait for adapters whose copy may still be under way."""
        self._uploads.wait_uploads(adapters)

    def supports(self, weights: LoadedAdapter | None) -> bool:
        """The base, and every adapter whose decoding tokens need LoRA weights alone."""
        return weights is None or weights.decodes_by_lora

    def logits(self, chunks: Sequence[Chunk], adapters: Sequence[LoadedAdapter | None]) -> torch.Tensor:
        """Logits [N, V] after each request's one token; valid until the next call."""
        rows = next(bucket for bucket in self._buckets if bucket >= len(chunks))
        self._uploads.wait_uploads(adapters)
        slots = self._table.slots(adapters)
        self._inputs.fill(chunks, slots, rows)
        return self._step(rows, max(slots) >= 0)()[: len(chunks)]

    def forget(self, version: str) -> None:
        """Drops references to an adapter that has left the device."""
        self._table.forget(version)
        self._uploads.forget(version)

    def _step(self, rows: int, adapted: bool) -> Step:
        if (rows, adapted) not in self._steps:
            assert self._capture is not None, "attached"
            self._steps[rows, adapted] = self._capture(lambda: self._forward(rows, adapted))
        return self._steps[rows, adapted]

    def _forward(self, rows: int, adapted: bool) -> torch.Tensor:
        batch = DecodeBatch(self._inputs, rows, self._kv)
        deltas = TableDeltas(self._inputs.tiles(rows), self._table) if adapted else None
        with self._linears.decoding(), self._layers.decoding():
            return self._runner.run(batch, deltas, 0)[0]


def row_buckets(max_batch: int) -> list[int]:
    """1, 2, 4, 8, ... and `max_batch` itself."""
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(min(2 * sizes[-1], max_batch))
    return sizes
