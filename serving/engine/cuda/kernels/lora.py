"""Adapter deltas of a decode step: shrink (x @ A.T) and expand (@ B.T, scaling, add), rows of one adapter in tiles.

A tile is up to ROWS tokens of one adapter. Each kernel reads the adapter's slot from `tile_slots`, then addresses, rank
and scaling from that slot's line of the table (see `cuda.lora`): a captured graph stays right whatever is loaded later.
Tiles without a slot (-1) end at once, and tokens without an adapter stand in no tile, so base rows are never touched.

Memory per step: every weight of an adapter once per tile, so 8 adapters of 84 MB (rank 16, Llama-8B) on 64 tokens read
0.67 GB, 0.22 ms at 3.0 TB/s, where one read per token would take 5.4 GB; the partial sums of a split input stay in L2.
Triton compiles a kernel again for each argument that is 1 or divides by 16; what differs from linear to linear and from
graph to graph is taken out of that, or a start would compile some 40 variants instead of about 20, half a second each.
Order of rounding as in peft: A's result, B's result, times scaling, and the sum are each rounded to the token's dtype.
Legend: M rows of a tile, R lines of lora_A (ranks), K inputs, O outputs.
"""

import torch
import triton
import triton.language as tl

from graftwork.serving.engine.cuda.kernels.elementwise import dot, rounded
from graftwork.serving.engine.cuda.lora import ROWS, GroupColumn, SiteColumn, SlotTable, Tiles

_LINES = 16
_BLOCK_K = 128
_BLOCK_O = 128
_MOST_SPLITS = 16
"""Parts of the input that sum apart: 8 tiles alone would leave most of 132 multiprocessors idle."""


def shrink(x_NI: torch.Tensor, tiles: Tiles, table: SlotTable, column: GroupColumn) -> torch.Tensor:
    """Partial sums of x @ A.T for every member of a group: fp32 [splits, N, lines]; lines of base rows stay unset."""
    assert x_NI.dtype == table.dtype, f"{x_NI.dtype} tokens and {table.dtype} adapters"
    count, inputs = x_NI.shape
    splits = min(_MOST_SPLITS, triton.cdiv(inputs, 2 * _BLOCK_K))
    span = triton.cdiv(triton.cdiv(inputs, splits), _BLOCK_K) * _BLOCK_K
    partial = torch.empty(splits, count, column.lines, dtype=torch.float32, device=x_NI.device)
    _shrink_kernel[(len(tiles.slots), splits)](
        x_NI,
        partial,
        tiles.slots,
        tiles.rows,
        table.entries,
        column.first,
        table.width,
        inputs,
        span,
        x_NI.stride(0),
        count,
        column.lines,
        ROWS=ROWS,
        LINES=_LINES,
        BLOCK_K=_BLOCK_K,
    )
    return partial


def expand(partial: torch.Tensor, tiles: Tiles, table: SlotTable, column: SiteColumn, out_NO: torch.Tensor) -> None:
    """Adds one member's delta to `out_NO` in place."""
    assert out_NO.dtype == table.dtype, f"{out_NO.dtype} results and {table.dtype} adapters"
    splits, count, lines = partial.shape
    outputs = out_NO.shape[1]
    _expand_kernel[(len(tiles.slots), triton.cdiv(outputs, _BLOCK_O))](
        partial,
        out_NO,
        tiles.slots,
        tiles.rows,
        table.entries,
        table.scalings,
        column.first,
        column.number,
        table.width,
        table.scalings.stride(0),
        count,
        lines,
        outputs,
        out_NO.stride(0),
        SPLITS=splits,
        ROWS=ROWS,
        LINES=_LINES,
        BLOCK_O=_BLOCK_O,
    )


@triton.jit(do_not_specialize=["column", "width", "count", "lines_most"])
def _shrink_kernel(
    x_ptr,
    partial_ptr,
    slots_ptr,
    rows_ptr,
    table_ptr,
    column,
    width,
    inputs,
    span,
    x_stride,
    count,
    lines_most,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + tile)
    if slot < 0:
        return
    entry = table_ptr + slot * width + column
    lines = tl.load(entry + 1)  # 0 where the adapter leaves this group alone
    a_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    row_M = tl.load(rows_ptr + tile * ROWS + tl.arange(0, ROWS))
    real_M = row_M >= 0
    stop = tl.minimum(split * span + span, inputs)
    for line in range(0, lines, LINES):
        line_R = line + tl.arange(0, LINES)
        live_R = line_R < lines
        sum_MR = tl.full((ROWS, LINES), 0.0, dtype=tl.float32)
        for k in range(split * span, stop, BLOCK_K):
            k_K = k + tl.arange(0, BLOCK_K)
            in_K = k_K < stop
            x_MK = tl.load(x_ptr + row_M[:, None] * x_stride + k_K[None, :], real_M[:, None] & in_K[None, :], other=0.0)
            a_KR = tl.load(a_ptr + line_R[None, :] * inputs + k_K[:, None], live_R[None, :] & in_K[:, None], other=0.0)
            sum_MR = dot(x_MK, a_KR, sum_MR)
        place = (split * count + row_M[:, None]) * lines_most + line_R[None, :]
        tl.store(partial_ptr + place, sum_MR, real_M[:, None] & live_R[None, :])


@triton.jit(do_not_specialize=["column", "number", "width", "sites", "count", "lines_most"])
def _expand_kernel(
    partial_ptr,
    out_ptr,
    slots_ptr,
    rows_ptr,
    table_ptr,
    scalings_ptr,
    column,
    number,
    width,
    sites,
    count,
    lines_most,
    outputs,
    out_stride,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tile = tl.program_id(0)
    slot = tl.load(slots_ptr + tile)
    if slot < 0:
        return
    entry = table_ptr + slot * width + column
    rank = tl.load(entry + 1)
    if rank == 0:
        return
    dtype = out_ptr.dtype.element_ty
    b_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 16)
    start = tl.load(entry + 2)
    scaling = tl.load(scalings_ptr + slot * sites + number)
    row_M = tl.load(rows_ptr + tile * ROWS + tl.arange(0, ROWS))
    real_M = row_M >= 0
    o_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_O = o_O < outputs
    sum_MO = tl.full((ROWS, BLOCK_O), 0.0, dtype=tl.float32)
    for line in range(0, rank, LINES):
        line_R = line + tl.arange(0, LINES)
        live_R = line_R < rank
        shrunk_MR = tl.full((ROWS, LINES), 0.0, dtype=tl.float32)
        for split in range(SPLITS):
            place = (split * count + row_M[:, None]) * lines_most + start + line_R[None, :]
            shrunk_MR += tl.load(partial_ptr + place, real_M[:, None] & live_R[None, :], other=0.0)
        b_RO = tl.load(b_ptr + o_O[None, :] * rank + line_R[:, None], live_R[:, None] & in_O[None, :], other=0.0)
        sum_MO = dot(rounded(shrunk_MR, dtype), b_RO, sum_MO)
    delta_MO = rounded(rounded(sum_MO, dtype).to(tl.float32) * scaling, dtype)
    place = row_M[:, None] * out_stride + o_O[None, :]
    live = real_M[:, None] & in_O[None, :]
    result_MO = tl.load(out_ptr + place, live, other=0.0)
    tl.store(out_ptr + place, rounded(result_MO.to(tl.float32) + delta_MO.to(tl.float32), dtype), live)
