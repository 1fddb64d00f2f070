"""Attention of a decode step: one query token a request over its own keys, read in place at its own length.

The place of a request's keys is read from device memory (`starts`, `caps`, `lengths`, see `StaticInputs`): a captured
graph stays right when rows grow or move. One program serves one request's KV head and all query heads that share it, on
one part of the keys; with several parts a second kernel joins them (flash-decoding, arXiv 2311.01282, eq. 3 of
FlashAttention). The grid is fixed: parts beyond a short request end at once, a request of length 0 is padding.

Memory per layer: each key and value once, 2 * length * Hkv * D * bytes a request. 64 requests of 256 tokens on Llama-8B
(Hkv 8, D 128, bf16, 32 layers) read 2.1 GB a step, 0.7 ms at 3.0 TB/s.
Legend: N requests, H query heads, K key-value heads, G = H / K, D head size, S keys of a block, P parts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from graftwork.serving.engine.cuda.kernels.elementwise import cdiv, dot, rounded

_BLOCK_S = 64
_ENOUGH_PROGRAMS = 264
"""Two for each of an H100's 132 multiprocessors: with that many, splitting the keys further gains nothing."""
_LONGEST_PART = 2048
"""Keys of one program at most, so that one long request does not keep a batch of short ones waiting."""


@dataclass(frozen=True)
class StaticInputs:
    """Place of each request's KV, [N] each: first token of its row in the arena, room of the row, tokens in it.

    Head h, position p of a request is line `start * heads + h * cap + p` of a layer's arena (see `kv_cache`). `lengths`
    counts the step's own token; 0 is padding.
    """

    starts: torch.Tensor
    caps: torch.Tensor
    lengths: torch.Tensor


def write_kv(
    keys: torch.Tensor, values: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, places: StaticInputs
) -> None:
    """Puts each request's newest key and value at the end of its row. keys, values: one layer's arena [lines, D]."""
    count, heads, size = k_NKD.shape
    _write_kernel[(count, heads)](
        keys,
        values,
        k_NKD,
        v_NKD,
        places.starts,
        places.caps,
        places.lengths,
        k_NKD.stride(0),
        k_NKD.stride(1),
        v_NKD.stride(0),
        v_NKD.stride(1),
        heads,
        size,
        BLOCK_D=triton.next_power_of_2(size),
    )


def attend(
    q_NHD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kv_heads: int,
    places: StaticInputs,
    *,
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixed values [N, H, D] in the query's dtype. longest: keys that any request can ever have (sets the grid).

    sinks_H: a further score of each head, without a value.
    """
    count, heads, size = q_NHD.shape
    out_NHD = torch.empty(count, heads, size, dtype=q_NHD.dtype, device=q_NHD.device)
    parts = split_count(count * kv_heads, longest if window is None else min(longest, window))
    sums = torch.empty(parts, count, heads, size, dtype=torch.float32, device=q_NHD.device) if parts > 1 else out_NHD
    stats = torch.empty(2, parts, count, heads, dtype=torch.float32, device=q_NHD.device)
    _attend_kernel[(count, kv_heads, parts)](
        q_NHD,
        keys,
        values,
        sums,
        stats,
        places.starts,
        places.caps,
        places.lengths,
        q_NHD if sinks_H is None else sinks_H,
        q_NHD.stride(0),
        q_NHD.stride(1),
        kv_heads,
        heads // kv_heads,
        size,
        count,
        parts,
        scale,
        window or 0,
        softcap or 0.0,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        SINKS=sinks_H is not None,
        WHOLE=parts == 1,
        BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_S=_BLOCK_S,
        BLOCK_D=max(16, triton.next_power_of_2(size)),
    )
    if parts > 1:
        _join_kernel[(count, heads)](
            sums,
            stats,
            out_NHD,
            heads,
            size,
            count,
            parts,
            BLOCK_P=triton.next_power_of_2(parts),
            BLOCK_D=triton.next_power_of_2(size),
        )
    return out_NHD


def split_count(programs: int, longest: int) -> int:
    """Parts of the keys: enough programs for the device, none shorter than a block, none longer than _LONGEST_PART."""
    wanted = max(triton.cdiv(_ENOUGH_PROGRAMS, programs), triton.cdiv(longest, _LONGEST_PART))
    return int(max(1, min(wanted, triton.cdiv(longest, 2 * _BLOCK_S))))


@triton.jit
def _write_kernel(
    keys_ptr,
    values_ptr,
    k_ptr,
    v_ptr,
    starts_ptr,
    caps_ptr,
    lengths_ptr,
    k_row,
    k_head,
    v_row,
    v_head,
    heads,
    size,
    BLOCK_D: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_ptr + row)
    if length == 0:
        return
    line = tl.load(starts_ptr + row) * heads + head * tl.load(caps_ptr + row) + length - 1
    d_D = tl.arange(0, BLOCK_D)
    in_D = d_D < size
    k_D = tl.load(k_ptr + row * k_row + head * k_head + d_D, in_D)
    v_D = tl.load(v_ptr + row * v_row + head * v_head + d_D, in_D)
    tl.store(keys_ptr + line * size + d_D, rounded(k_D.to(tl.float32), keys_ptr.dtype.element_ty), in_D)
    tl.store(values_ptr + line * size + d_D, rounded(v_D.to(tl.float32), values_ptr.dtype.element_ty), in_D)


@triton.jit(do_not_specialize=["count", "parts", "window"])
def _attend_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    stats_ptr,
    starts_ptr,
    caps_ptr,
    lengths_ptr,
    sinks_ptr,
    q_row,
    q_head,
    kv_heads,
    group,
    size,
    count,
    parts,
    scale,
    window,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    span = cdiv(cdiv(length - first, parts), BLOCK_S) * BLOCK_S
    begin = first + part * span
    stop = tl.minimum(begin + span, length)
    line = tl.load(starts_ptr + row) * kv_heads + head * tl.load(caps_ptr + row)

    g_G, d_D = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    in_G, in_D = g_G < group, d_D < size
    live_GD = in_G[:, None] & in_D[None, :]
    dtype = keys_ptr.dtype.element_ty
    q_place = row * q_row + (head * group + g_G[:, None]) * q_head + d_D[None, :]
    q_GD = rounded(tl.load(q_ptr + q_place, live_GD, other=0.0).to(tl.float32), dtype)
    most_G = tl.full((BLOCK_G,), -float("inf"), dtype=tl.float32)
    total_G = tl.full((BLOCK_G,), 0.0, dtype=tl.float32)
    sum_GD = tl.full((BLOCK_G, BLOCK_D), 0.0, dtype=tl.float32)
    if SINKS:  # the first part begins with the sink's weight, e^0 relative to its score
        sink_G = tl.load(sinks_ptr + head * group + g_G, in_G, other=0.0).to(tl.float32)
        most_G = tl.where(part == 0, sink_G, most_G)
        total_G = tl.where(part == 0, 1.0, total_G)
    for s in range(begin, stop, BLOCK_S):
        s_S = s + tl.arange(0, BLOCK_S)
        in_S = s_S < stop
        k_DS = tl.load(keys_ptr + (line + s_S[None, :]) * size + d_D[:, None], in_D[:, None] & in_S[None, :], other=0.0)
        score_GS = dot(q_GD, k_DS, tl.full((BLOCK_G, BLOCK_S), 0.0, dtype=tl.float32)) * scale
        if SOFTCAP:
            score_GS = softcap * (2.0 * tl.sigmoid(2.0 * score_GS / softcap) - 1.0)  # softcap * tanh(score / softcap)
        score_GS = tl.where(in_S[None, :], score_GS, -float("inf"))
        higher_G = tl.maximum(most_G, tl.max(score_GS, axis=1))
        weight_GS = tl.exp(score_GS - higher_G[:, None])
        fade_G = tl.exp(most_G - higher_G)
        total_G = total_G * fade_G + tl.sum(weight_GS, axis=1)
        v_SD = tl.load(
            values_ptr + (line + s_S[:, None]) * size + d_D[None, :], in_S[:, None] & in_D[None, :], other=0.0
        )
        sum_GD = dot(rounded(weight_GS, dtype), v_SD, sum_GD * fade_G[:, None])
        most_G = higher_G

    heads = kv_heads * group
    place_G = (part * count + row) * heads + head * group + g_G
    if WHOLE:
        sum_GD = sum_GD / tl.where(total_G > 0, total_G, 1.0)[:, None]
    else:
        tl.store(stats_ptr + place_G, most_G, in_G)
        tl.store(stats_ptr + parts * count * heads + place_G, total_G, in_G)
    tl.store(out_ptr + place_G[:, None] * size + d_D[None, :], rounded(sum_GD, out_ptr.dtype.element_ty), live_GD)


@triton.jit(do_not_specialize=["count", "parts"])
def _join_kernel(
    sums_ptr,
    stats_ptr,
    out_ptr,
    heads,
    size,
    count,
    parts,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    p_P, d_D = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    in_P, in_D = p_P < parts, d_D < size
    place_P = (p_P * count + row) * heads + head
    most_P = tl.load(stats_ptr + place_P, in_P, other=-float("inf"))
    total_P = tl.load(stats_ptr + parts * count * heads + place_P, in_P, other=0.0)
    most = tl.max(most_P, axis=0)
    most = tl.where(most == -float("inf"), 0.0, most)  # padding: no part has keys
    fade_P = tl.exp(most_P - most)
    sum_PD = tl.load(sums_ptr + place_P[:, None] * size + d_D[None, :], in_P[:, None] & in_D[None, :], other=0.0)
    total = tl.sum(total_P * fade_P, axis=0)
    out_D = tl.sum(sum_PD * fade_P[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (row * heads + head) * size + d_D, rounded(out_D, out_ptr.dtype.element_ty), in_D)
