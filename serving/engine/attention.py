"""Attention of the model's layers over packed tokens: writes new keys and values to the KV, and reads them in place.

Registered once under NAME in transformers' `ALL_ATTENTION_FUNCTIONS`. The batch is a context variable of the pass:
some decoders (Nemotron, StableLM) hand no keyword arguments down to their attention. Decoding reads grouped heads (GQA)
by batched matmul over views of the KV arena, so nothing is repeated or copied; measured on 2 AVX2 cores it is level
with SDPA on the same views.
A forward pass packs the tokens of all running requests into one row, without padding: first one token of each decoding
request, in the order that suits the adapters, then the prompt chunks. Attention takes decoding tokens in the order of
their KV.
Legend: T packed tokens, H query heads, K key-value heads, G = H / K, D head size, N requests of a run, S keys read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graftwork.errors import BaseModelError
from graftwork.serving.engine.cpu.kernels import DecodeRows, Kernels
from graftwork.serving.engine.kv_cache import KvRow, KvShape, KvStore


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
    """Tensors of one forward pass; `attend` finds it where `attending` has set it."""

    ids_1T: torch.Tensor
    positions_1T: torch.Tensor
    runs: list[DecodeRun]
    segments: list[PromptChunk]
    kv: KvStore | None
    chunks: Sequence[Chunk]
    by_kv_N: torch.Tensor | None = None
    """Place where each decoding token is packed, by KV place; None: in that very order."""
    rows: DecodeRows | None = None
    """The decoding tokens for the kernel that attends for them, where there is one."""
    seen: dict[int, KvShape] = field(default_factory=dict)
    """Key-value shape per layer, noted where the batch has no KV."""
    _lines: dict[int, torch.Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int, int | None, int], torch.Tensor] = field(default_factory=dict)

    def write_lines(self, layer: int) -> torch.Tensor:
        """Lines of the arena that take the new keys, [T * Hkv], token-major; the same for all layers of equal heads."""
        assert self.kv is not None, "a batch without KV writes nothing"
        heads = self.kv.shapes[layer].heads
        if heads not in self._lines:
            starts = [chunk.row.start * heads for chunk in self.chunks if chunk.row is not None]
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
            self._biases[key] = _causal_bias(length_R, run.longest, window, dtype)
        return self._biases[key]

    def segment_bias(self, index: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 where a prompt token may look (itself and before), -inf elsewhere: [count, context + count]."""
        key = (-1 - index, window, 0)
        if key not in self._biases:
            segment = self.segments[index]
            stop = segment.context + segment.count
            length_T1 = torch.arange(segment.context + 1, stop + 1, device=self.ids_1T.device)[:, None]
            self._biases[key] = _causal_bias(length_T1, stop, window, dtype)
        return self._biases[key]


def _causal_bias(length: torch.Tensor, longest: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """length: keys of each query, its own included; with a window it looks at the last of them alone."""
    place_S = torch.arange(longest, device=length.device)
    hidden = place_S >= length
    if window is not None:
        hidden |= place_S < length - window
    return torch.zeros(hidden.shape, dtype=dtype, device=length.device).masked_fill_(hidden, float("-inf"))


def pack(
    decoding: Sequence[Chunk],
    prompts: Sequence[Chunk],
    kv: KvStore | None,
    device: torch.device,
    order: Sequence[int] | None = None,
    kernels: Kernels | None = None,
) -> StepBatch:
    """One batch of single-token chunks (sorted by KV place: `KvRow.start`) and prompt chunks.

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


def _runs(decoding: Sequence[Chunk]) -> list[DecodeRun]:
    groups: list[list[KvRow]] = []
    for chunk in decoding:
        assert chunk.row is not None, "a decoding request has a KV row"
        last = groups[-1][-1] if groups else None
        if last is not None and (chunk.row.page, chunk.row.index) == (last.page, last.index + 1):
            groups[-1].append(chunk.row)
        else:
            groups.append([chunk.row])
    runs, first = [], 0
    for group in groups:
        stop = first + len(group)
        lengths = tuple(chunk.start + 1 for chunk in decoding[first:stop])
        runs.append(DecodeRun(first, len(group), group[0], lengths))
        first = stop
    return runs


NAME = "graftwork_engine"

_KNOWN_OPTIONS = frozenset(
    {"dropout", "sliding_window", "softcap", "position_ids", "use_cache", "cache_position", "output_attentions"}
    | {"output_hidden_states", "return_dict", "output_router_logits", "s_aux"}
)
"""Options of a call that it follows, and those that change nothing in it."""


def register() -> None:
    """Makes NAME known to transformers; once a process is enough, more do no harm."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def attend(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # transformers passes it
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each packed token over its own request. Returns [1, T, H, D]."""
    batch = _BATCH.get()
    _require_known(options)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(layer, scale, options.get("sliding_window"), options.get("softcap"), options.get("s_aux"))
    size = value_1KTD.shape[-1]
    if size < key_1KTD.shape[-1]:  # MLA; keys and values are kept in rows of one size
        value_1KTD = pad(value_1KTD, (0, key_1KTD.shape[-1] - size))
    if isinstance(batch, StepBatch):
        out_THD = _attend_packed(call, batch, query_1HTD, key_1KTD, value_1KTD)
    else:
        out_THD = batch.attend(call, query_1HTD, key_1KTD, value_1KTD)
    return out_THD[None, ..., :size], None


def _attend_packed(
    call: "Call", batch: StepBatch, query_1HTD: torch.Tensor, key_1KTD: torch.Tensor, value_1KTD: torch.Tensor
) -> torch.Tensor:
    """Attention of a pass over packed tokens. Returns [T, H, D]."""
    layer = call.layer
    query_THD, key_TKD, value_TKD = (part[0].transpose(0, 1) for part in (query_1HTD, key_1KTD, value_1KTD))
    out_THD = torch.empty(query_THD.shape[:2] + value_1KTD.shape[-1:], dtype=query_1HTD.dtype, device=query_1HTD.device)
    rows = batch.rows if call.sinks_H is None else None
    rows = rows if rows is not None and rows.takes(layer, query_THD, value_TKD) else None
    if batch.kv is None:
        if key_1KTD.shape != value_1KTD.shape:
            found = f"a head's key has {key_1KTD.shape[-1]} values and its value {value_1KTD.shape[-1]}"
            raise BaseModelError("the model", found, "a value has no more of them than a key")
        batch.seen[layer] = KvShape(key_1KTD.shape[1], key_1KTD.shape[3])
    elif rows is None or batch.segments:
        lines = batch.write_lines(layer)
        for arena, fresh_TKD in ((batch.kv.keys[layer], key_TKD), (batch.kv.values[layer], value_TKD)):
            arena.index_copy_(0, lines, fresh_TKD.reshape(len(lines), -1).to(arena.dtype))
    if rows is not None:
        fresh = (key_TKD, value_TKD)
        writes = not batch.segments
        rows.attend(
            layer,
            query_THD,
            fresh,
            out_THD,
            writes=writes,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
        )
    elif batch.runs:
        _decode_all(call, batch, query_THD, out_THD)
    for index, segment in enumerate(batch.segments):
        stop = segment.first + segment.count
        fresh = (key_1KTD[:, :, segment.first : stop], value_1KTD[:, :, segment.first : stop])
        out_1HTD = _prefill(call, batch, index, segment, query_1HTD[:, :, segment.first : stop], *fresh)
        out_THD[segment.first : stop] = out_1HTD[0].transpose(0, 1)
    return out_THD


class Call(NamedTuple):
    """Settings of one layer's attention."""

    layer: int
    scale: float
    window: int | None
    softcap: float | None
    sinks_H: torch.Tensor | None = None
    """A further score of each head, which takes a share of the softmax and has no value (gpt-oss)."""


class OwnAttention(Protocol):
    """A batch that attends by itself: decoding on a GPU."""

    def attend(self, call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [1, H, T, D], key and value [1, K, T, D] -> [T, H, D]; keeps the new keys and values."""


_BATCH: ContextVar[StepBatch | OwnAttention] = ContextVar("batch of the forward pass")


@contextmanager
def attending(batch: StepBatch | OwnAttention) -> Iterator[None]:
    """Within it, passes of models in this thread attend over the batch."""
    token = _BATCH.set(batch)
    try:
        yield
    finally:
        _BATCH.reset(token)


def _require_known(options: dict[str, Any]) -> None:
    unknown = [key for key, value in options.items() if value is not None and key not in _KNOWN_OPTIONS]
    if unknown:
        raise BaseModelError(
            "the model", f"attention option {min(unknown)}", "the engine's attention knows its options"
        )


def _decode_all(call: Call, batch: StepBatch, query_THD: torch.Tensor, out_THD: torch.Tensor) -> None:
    """The decoding tokens, by KV place and back."""
    if batch.by_kv_N is None:
        for index in range(len(batch.runs)):
            _decode(call, batch, index, query_THD, out_THD)
        return
    query_NHD = query_THD.index_select(0, batch.by_kv_N)
    out_NHD = torch.empty((len(query_NHD), *out_THD.shape[1:]), dtype=out_THD.dtype, device=out_THD.device)
    for index in range(len(batch.runs)):
        _decode(call, batch, index, query_NHD, out_NHD)
    out_THD[: len(out_NHD)].index_copy_(0, batch.by_kv_N, out_NHD)


def _decode(call: Call, batch: StepBatch, index: int, query_THD: torch.Tensor, out_THD: torch.Tensor) -> None:
    """One token each of neighbouring KV rows: scores, softmax and sum over the rows' common view."""
    run = batch.runs[index]
    assert batch.kv is not None, "decoding needs KV"
    keys_BSD, values_BSD = batch.kv.run_view(run.row, run.count, call.layer, run.longest)
    query_BGD = query_THD[run.first : run.first + run.count].reshape(len(keys_BSD), -1, query_THD.shape[-1])
    heads = len(keys_BSD) // run.count
    bias_B1S = batch.run_bias(index, heads, call.window, keys_BSD.dtype)
    scores_BGS = _scores(call, query_BGD.to(keys_BSD.dtype), keys_BSD, bias_B1S)
    sinks_BG1 = None
    if call.sinks_H is not None:
        sinks_BG1 = call.sinks_H.view(heads, -1, 1).repeat(run.count, 1, 1)
    mixed_BGD = torch.bmm(_shares(scores_BGS, sinks_BG1), values_BSD)
    out_THD[run.first : run.first + run.count] = mixed_BGD.view(run.count, -1, values_BSD.shape[-1])


def _scores(call: Call, query: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if call.softcap is None:
        return torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=call.scale)
    scores = torch.bmm(query, keys.transpose(1, 2)).mul_(call.scale)
    return torch.tanh(scores.div_(call.softcap)).mul_(call.softcap).add_(bias)


def _shares(scores_BGS: torch.Tensor, sinks_BG1: torch.Tensor | None) -> torch.Tensor:
    """Softmax of the scores; sinks take part in it and are left out of the result."""
    if sinks_BG1 is None:
        return torch.softmax(scores_BGS, dim=-1)
    together = torch.cat([scores_BGS, sinks_BG1.to(scores_BGS.dtype)], dim=-1)
    return torch.softmax(together, dim=-1)[..., :-1]


def _prefill(
    call: Call,
    batch: StepBatch,
    index: int,
    segment: PromptChunk,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
) -> torch.Tensor:
    """A prompt chunk over itself and the context in its KV row. Returns [1, H, T, D]."""
    window, length = call.window, segment.context + segment.count
    whole = segment.context == 0 and (window is None or window >= length)
    fused = call.softcap is None and call.sinks_H is None
    if whole and fused:  # the very call that transformers' sdpa makes: equal to it bit for bit
        return scaled_dot_product_attention(
            query_1HTD, key_1KTD, value_1KTD, is_causal=segment.count > 1, scale=call.scale, enable_gqa=True
        )
    if segment.context:
        assert batch.kv is not None, "context lives in KV"
        assert segment.row is not None, "context lives in KV"
        key_1KTD, value_1KTD = (
            view[None, :, :length].to(query_1HTD.dtype) for view in batch.kv.row_view(segment.row, call.layer)
        )
    bias = batch.segment_bias(index, window, query_1HTD.dtype)
    if fused:
        return scaled_dot_product_attention(
            query_1HTD, key_1KTD, value_1KTD, attn_mask=bias, scale=call.scale, enable_gqa=True
        )
    _, heads, count, size = query_1HTD.shape
    groups = heads // key_1KTD.shape[1]
    query = query_1HTD[0].reshape(key_1KTD.shape[1], groups * count, size)
    scores = _scores(call, query, key_1KTD[0], bias.repeat(groups, 1))
    sinks = None
    if call.sinks_H is not None:
        sinks = call.sinks_H.view(-1, groups, 1).repeat_interleave(count, dim=1)
    mixed = torch.bmm(_shares(scores, sinks), value_1KTD[0])
    return mixed.view(1, heads, count, -1)
