"""Decoding on a GPU: every step is one replay of a graph captured at the start, whatever adapters and rows take part.

Graphs are captured for 1, 2, 4, 8, ... rows up to `max_batch`, with adapters and without; a batch is padded up to one.
They read tokens, KV places and adapter slots from device memory (`StepInputs`, `cuda.lora`), so adapters come and go
and KV rows move without another capture. Prompts run eagerly, on torch's own path. A captured graph holds addresses,
not values: everything that a step depends on is read from one buffer, and padding rows have length 0.
Legend: N rows of the step (padding included), T tiles (at most N), H query heads, K key-value heads, D head size.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.attention import Call, Chunk
from graftwork.serving.engine.cuda.kernels import attention, elementwise
from graftwork.serving.engine.cuda.kernels.lora import expand, shrink
from graftwork.serving.engine.cuda.kernels.nf4 import PackedWeight, multiply
from graftwork.serving.engine.cuda.lora import ROWS, SlotTable, Tiles, tiled
from graftwork.serving.engine.kv_cache import KvStore
from graftwork.serving.engine.lora_layers import LoraLayer
from graftwork.serving.engine.model_runner import DecodeLayers, Runner

_IDS, _POSITIONS, _STARTS, _CAPS, _LENGTHS, _SLOTS, _ROWS = range(7)
_LINES = _ROWS + ROWS


MOST_ROWS = 64
"""Above it, unpacking the weight once is cheaper than doing so in every tile of tokens."""

Forward = Callable[..., torch.Tensor]


class DecodeBatch:
    """Stands for a `StepBatch` in the model's keyword arguments; everything it reads has a fixed address."""

    def __init__(self, inputs: "StepInputs", rows: int, kv: KvStore) -> None:
        self.ids_1T, self.positions_1T = inputs.ids_1N(rows), inputs.positions_1N(rows)
        self._places, self._kv = inputs.places(rows), kv

    def attend(
        self, call: Call, query_1HND: torch.Tensor, key_1KND: torch.Tensor, value_1KND: torch.Tensor
    ) -> torch.Tensor:
        """Writes the new keys and values, then attends. Returns [N, H, D]."""
        q_NHD, k_NKD, v_NKD = (_rows(part) for part in (query_1HND, key_1KND, value_1KND))
        keys, values = self._kv.keys[call.layer], self._kv.values[call.layer]
        attention.write_kv(keys, values, k_NKD, v_NKD, self._places)
        return attention.attend(
            q_NHD,
            keys,
            values,
            k_NKD.shape[1],
            self._places,
            longest=self._kv.classes[-1],
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            sinks_H=call.sinks_H,
        )


def _rows(part_1HND: torch.Tensor) -> torch.Tensor:
    """[1, H, N, D] -> [N, H, D] with a contiguous last dimension; a view where it is one already."""
    part_NHD = part_1HND[0].transpose(0, 1)
    return part_NHD if part_NHD.stride(-1) == 1 else part_NHD.contiguous()


class TableDeltas:
    """Deltas that `Sites` adds: one shrink for the linears of a group (q/k/v, gate/up), one expand each."""

    def __init__(self, tiles: Tiles, table: SlotTable) -> None:
        self._tiles, self._table = tiles, table
        self._group = ""
        self._input: torch.Tensor | None = None
        self._partial: torch.Tensor | None = None

    def add(self, site: LoraLayer, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Adds in place: `result` is the linear's own fresh output."""
        if self._partial is None or site.group != self._group or x is not self._input:
            self._group, self._input = site.group, x
            x_NI = x.reshape(-1, x.shape[-1])
            self._partial = shrink(x_NI, self._tiles, self._table, self._table.groups[site.group])
        out_NO = result.view(-1, result.shape[-1])
        expand(self._partial, self._tiles, self._table, self._table.sites[site.name], out_NO)
        return result


_log = logging.getLogger(__name__)

Step = Callable[[], torch.Tensor]
"""Computes one decode step from what `StepInputs` holds; returns the logits [rows, V], valid until the next step."""
Capture = Callable[[Step], Step]
"""Makes a step quick to repeat."""

_MOVING_ROPE = ("dynamic", "longrope")


def direct(step: Step) -> Step:
    """The step as it is: the same kernels, launched one by one from Python (about 45 ms for 32 layers)."""
    return step


class GraphCapture:
    """Records a step's kernels once and replays them with one call. One memory pool serves all graphs of an engine.

    Steps never overlap and a step's logits are read before the next one, so graphs may share their intermediates. A
    model that asks the device something in the middle of a step cannot be recorded: it is said, and its steps run as
    they are.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._refused = False

    def __call__(self, step: Step) -> Step:
        if self._refused:
            return direct(step)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # first call: compiles kernels, picks algorithms, fills caches
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # others load adapters
                logits = step()
        except RuntimeError as error:  # what CUDA raises for a step that waits for the device
            _log.warning("decoding without CUDA graphs, about 10 times slower: this model's step waits (%s)", error)
            self._refused = True
            return direct(step)

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


def reads_positions_on_host(config: object) -> str | None:
    """The kind of RoPE that asks the device for the longest position every step, which no graph can hold; or None."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope.get("rope_type")] if "rope_type" in rope else [one.get("rope_type") for one in rope.values() if one]
    return next((kind for kind in kinds if kind in _MOVING_ROPE), None)


class GraphDecode:
    """Decodes on a GPU; the engine's thread alone uses it. capture: None takes graphs where the model allows them."""

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        self._device, self._capture = device, capture
        self._linears = DecodeLinears()
        self.forward_of = self._linears.forward_of
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._uploads: dict[LoadedAdapter, torch.cuda.Event] = {}  # copies under way
        self._steps: dict[tuple[int, bool], Step] = {}

    def attach(self, runner: Runner, kv: KvStore, *, max_batch: int, max_rank: int) -> None:
        """Sets up the device memory that steps read."""
        self._runner, self._kv = runner, kv
        self._layers = DecodeLayers(runner.model, runner.dtype, elementwise)
        self._buckets = row_buckets(max_batch)
        self._inputs = StepInputs(max_batch, self._device)
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

    def copy_adapter(self, copy: Callable[[], LoadedAdapter]) -> LoadedAdapter:
        """The adapter that `copy` copies, on a side stream. Returns before the copy has ended; the step goes on.

        The side stream first waits for the work queued so far: the copy may go into memory that an adapter has just
        left, and that a prompt of it may still be reading.
        """
        if self._stream is None:
            return copy()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            weights = copy()
            self._uploads[weights] = torch.cuda.Event()
            self._uploads[weights].record(self._stream)
        return weights

    def wait_uploads(self, adapters: Iterable[LoadedAdapter | None]) -> None:
        """Orders the current stream after the copies of these adapters."""
        for weights in adapters:
            if weights is not None and weights in self._uploads:
                torch.cuda.current_stream(self._device).wait_event(self._uploads.pop(weights))

    def supports(self, weights: LoadedAdapter | None) -> bool:
        """The base, and every adapter whose decoding tokens need LoRA weights alone."""
        return weights is None or weights.decodes_by_lora

    def logits(self, chunks: Sequence[Chunk], adapters: Sequence[LoadedAdapter | None]) -> torch.Tensor:
        """Logits [N, V] after each request's one token; valid until the next call."""
        rows = next(bucket for bucket in self._buckets if bucket >= len(chunks))
        self.wait_uploads(adapters)
        slots = self._table.slots(adapters)
        self._inputs.fill(chunks, slots, rows)
        return self._step(rows, max(slots) >= 0)()[: len(chunks)]

    def forget(self, version: str) -> None:
        """Drops references to an adapter that has left the device."""
        self._table.forget(version)
        self._uploads = {one: event for one, event in self._uploads.items() if one.version != version}

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


class StepInputs:
    """One pinned buffer on the host and its image on the device, int64 [7 lines + tiles, rows]."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._host = torch.zeros(_LINES, rows, dtype=torch.long, pin_memory=device.type == "cuda")
        self._device = torch.zeros(_LINES, rows, dtype=torch.long, device=device)
        self.fill([], [], rows)

    def ids_1N(self, rows: int) -> torch.Tensor:
        return self._device[_IDS, :rows][None]

    def positions_1N(self, rows: int) -> torch.Tensor:
        return self._device[_POSITIONS, :rows][None]

    def places(self, rows: int) -> attention.StaticInputs:
        return attention.StaticInputs(*(self._device[line, :rows] for line in (_STARTS, _CAPS, _LENGTHS)))

    def tiles(self, rows: int) -> Tiles:
        return Tiles(self._device[_SLOTS, :rows], self._device[_ROWS:].view(-1, ROWS)[:rows])

    def fill(self, chunks: Sequence[Chunk], slots: Sequence[int], rows: int) -> None:
        """Writes one step: each chunk's single token and KV place, each token's slot (-1: base), padded to `rows`.

        The copy is ordered on the current stream. The host's half is written again only after the step's tokens came
        back, which is after this copy.
        """
        host, pad = self._host.numpy(), [0] * (rows - len(chunks))
        kept = [chunk.row for chunk in chunks if chunk.row is not None]
        assert len(kept) == len(chunks), "a decoding request has a KV row"
        host[_IDS, :rows] = [chunk.ids[0] for chunk in chunks] + pad
        host[_POSITIONS, :rows] = [chunk.start for chunk in chunks] + pad
        host[_STARTS, :rows] = [row.start for row in kept] + pad
        host[_CAPS, :rows] = [row.cap for row in kept] + pad
        host[_LENGTHS, :rows] = [chunk.start + 1 for chunk in chunks] + pad
        host[_SLOTS, :rows] = -1
        tile_rows = host[_ROWS:].reshape(-1, ROWS)
        for number, (slot, own) in enumerate(tiled(slots)):
            host[_SLOTS, number] = slot
            tile_rows[number] = own + [-1] * (ROWS - len(own))
        self._device.copy_(self._host, non_blocking=True)


class DecodeLinears:
    """Gives each packed linear a forward with two ways; `decoding` opens the fused one.

    Prompts stay on bitsandbytes' path, so that their logits are those of peft bit for bit.
    """

    def __init__(self) -> None:
        self._on = False

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within it, packed linears use the kernel for up to MOST_ROWS tokens."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def forward_of(self, module: Any) -> Forward:
        """The forward that the engine's hook calls; the module's own where it is no 4-bit linear."""
        own: Forward = module.forward
        if not _is_packed(module):
            return own
        state: list[PackedWeight] = []

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not self._on or x.numel() > MOST_ROWS * x.shape[-1] or args or kwargs:
                return own(x, *args, **kwargs)
            if not state:
                state.append(packed_weight(module.weight))
            dtype = module.compute_dtype or x.dtype  # as `Linear4bit.forward`: the result is in x's
            x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
            return multiply(x_NI, state[0], module.bias).to(x.dtype).view(*x.shape[:-1], state[0].outputs)

        return forward


def packed_weight(parameter: Any) -> PackedWeight:
    """The tensors of a bitsandbytes `Params4bit`, not copied."""
    quant = parameter.quant_state
    outputs, inputs = quant.shape
    nested = quant.state2
    outer = (nested.code, nested.absmax, nested.blocksize, quant.offset) if quant.nested else ()
    codes = parameter.data.view(torch.uint8).reshape(-1)
    return PackedWeight(outputs, inputs, codes, quant.code.float(), quant.absmax, quant.blocksize, *outer)


def _is_packed(module: Any) -> bool:
    """A quantised Linear4bit whose lines hold whole blocks of 64, 128, ... weights (fp4 too: the book is data).

    One packed from another 16-bit dtype than it computes in would be rounded twice; it is left to bitsandbytes.
    """
    quant = getattr(getattr(module, "weight", None), "quant_state", None)
    if quant is None or not hasattr(quant, "quant_type"):
        return False
    once = quant.dtype in (torch.float32, module.compute_dtype or quant.dtype)
    return once and quant.blocksize % 64 == 0 and quant.shape[1] % quant.blocksize == 0
