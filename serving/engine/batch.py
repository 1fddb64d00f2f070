"""What one forward pass computes: the tokens of all running requests packed into one row, without padding.

Order of the packed tokens: first one token of each decoding request, in the order that suits the adapters, then the
prompt chunks. Attention takes the decoding ones in the order of their KV. Legend: T packed tokens, N decoding ones, S
keys read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graftwork.serving.engine.cpu.attention import DecodeRows
from graftwork.serving.engine.cpu.kernels import Kernels
from graftwork.serving.engine.kv import KvRow, KvShape, KvStore


@dataclass(frozen=True)
class Chunk:
    """Tokens of one request that one step computes: positions `start` to `start + len(ids)`."""

    ids: Sequence[int]
    start: int
    row: KvRow | None
    """None computes without keeping keys and values (only at start 0)."""


@dataclass(frozen=True)
class DecodeRun:
    """Decoding requests whose KV rows are neighbours: `first` to `first + count` by KV place, KV from `row` on."""

    first: int
    count: int
    row: KvRow
    lengths: tuple[int, ...]
    """Keys each request reads, its own token included."""

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class PromptChunk:
    """A prompt chunk: packed tokens `first` to `first + count`, which follow `context` tokens already in `row`."""

    first: int
    count: int
    context: int
    row: KvRow | None


@dataclass
class StepBatch:
    """Tensors of one forward pass. `attention` finds it in its keyword arguments (key BATCH_KEY)."""

    ids_1T: torch.Tensor
    positions_1T: torch.Tensor
    runs: list[DecodeRun]
    segments: list[PromptChunk]
    kv: KvStore | None
    chunks: Sequence[Chunk]
    by_kv_N: torch.Tensor | None = None
    """Where each decoding token is packed, by KV place; None: in that very order."""
    rows: DecodeRows | None = None
    """The decoding tokens for the kernel that attends for them, where there is one."""
    seen: dict[int, KvShape] = field(default_factory=dict)
    """Key-value shape per layer, noted where the batch has no KV."""
    _lines: dict[int, torch.Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int, int | None, int], torch.Tensor] = field(default_factory=dict)

    @property
    def decoding(self) -> int:
        """Leading packed tokens that belong to `runs`."""
        return sum(run.count for run in self.runs)

    def write_lines(self, layer: int) -> torch.Tensor:
        """Lines of the arena that take the new keys, [T * Hkv], token-major; the same for all layers of equal heads."""
        assert self.kv is not None, "a batch without KV writes nothing"
        heads = self.kv.shapes[layer].heads
        if heads not in self._lines:
            starts = [self.kv.first_line(chunk.row, layer) for chunk in self.chunks if chunk.row is not None]
            counts = torch.tensor([len(chunk.ids) for chunk in self.chunks])
            caps = [chunk.row.cap for chunk in self.chunks if chunk.row is not None]
            start_T = torch.repeat_interleave(torch.tensor(starts), counts).to(self.ids_1T.device)
            cap_T = torch.repeat_interleave(torch.tensor(caps), counts).to(self.ids_1T.device)
            head_H = torch.arange(heads, device=self.ids_1T.device)
            lines_TH = (start_T + self.positions_1T[0])[:, None] + cap_T[:, None] * head_H
            self._lines[heads] = lines_TH.flatten()
        return self._lines[heads]

    def run_bias(self, index: int, heads: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 where a decoding request may look, -inf elsewhere: [count * heads, 1, S]."""
        key = (index, window, heads)
        if key not in self._biases:
            run, device = self.runs[index], self.ids_1T.device
            length_R = torch.tensor(run.lengths, device=device).repeat_interleave(heads)[:, None, None]
            place_S = torch.arange(run.longest, device=device)
            hidden = place_S >= length_R
            if window is not None:
                hidden |= place_S < length_R - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self._biases[key] = bias.masked_fill_(hidden, float("-inf"))
        return self._biases[key]

    def segment_bias(self, index: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 where a prompt token may look (itself and before), -inf elsewhere: [count, context + count]."""
        key = (-1 - index, window, 0)
        if key not in self._biases:
            segment, device = self.segments[index], self.ids_1T.device
            query = torch.arange(segment.context, segment.context + segment.count, device=device)[:, None]
            place = torch.arange(segment.context + segment.count, device=device)
            hidden = place > query
            if window is not None:
                hidden |= place <= query - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self._biases[key] = bias.masked_fill_(hidden, float("-inf"))
        return self._biases[key]


def pack(
    decoding: Sequence[Chunk],
    prompts: Sequence[Chunk],
    kv: KvStore | None,
    device: torch.device,
    order: Sequence[int] | None = None,
    kernels: Kernels | None = None,
) -> StepBatch:
    """One batch of single-token chunks (sorted by KV place, as `by_place` gives them) and prompt chunks.

    order: in which the single tokens are packed; None: as they come. kernels: a CPU's.
    """
    chunks = [*(decoding if order is None else [decoding[n] for n in order]), *prompts]
    ids = [token for chunk in chunks for token in chunk.ids]
    positions = [place for chunk in chunks for place in range(chunk.start, chunk.start + len(chunk.ids))]
    segments, first = [], len(decoding)
    for chunk in prompts:
        segments.append(PromptChunk(first, len(chunk.ids), chunk.start, chunk.row))
        first += len(chunk.ids)
    singles = chunks[: len(decoding)]
    places = [chunk.row for chunk in singles if chunk.row is not None]
    lengths = [chunk.start + 1 for chunk in singles]
    return StepBatch(
        ids_1T=torch.tensor([ids], device=device),
        positions_1T=torch.tensor([positions], device=device),
        runs=_runs(decoding),
        segments=segments,
        kv=kv,
        chunks=chunks,
        by_kv_N=None if order is None else torch.tensor(inverse(order), device=device),
        rows=DecodeRows(kernels, kv, places, lengths) if kernels is not None and kv is not None and places else None,
    )


def inverse(order: Sequence[int]) -> list[int]:
    """The place of each number in `order`."""
    places = [0] * len(order)
    for place, number in enumerate(order):
        places[number] = place
    return places


def by_place(row: KvRow) -> tuple[int, int]:
    """Sort key that brings neighbouring KV rows together."""
    return row.page, row.index


def _runs(decoding: Sequence[Chunk]) -> list[DecodeRun]:
    groups: list[list[Chunk]] = []
    for chunk in decoding:
        assert chunk.row is not None, "a decoding request has a KV row"
        last = groups[-1][-1].row if groups else None
        if last is not None and (chunk.row.page, chunk.row.index) == (last.page, last.index + 1):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    runs, first = [], 0
    for group in groups:
        assert group[0].row is not None, "checked above"
        runs.append(DecodeRun(first, len(group), group[0].row, tuple(chunk.start + 1 for chunk in group)))
        first += len(group)
    return runs
