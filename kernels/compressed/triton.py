"""Compressed attention on GPUs: launches the Triton kernels, forward and backward. Memory linear in T, bit-equal runs.

Forward sorts keys and values by level (one gather each), then every block of rows runs one online softmax over what it sees.
Backward recomputes the weights from each row's maximum and sum: d_q block by block of rows; d_k and d_v block by block of keys,
no atomics. The sink copies come first, since their gradients are added to those of the tokens they stand for.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from unfold.kernels.common.launch import (
    DTYPES,
    HEAD_DIMS,
    INTERPRETED,
    LOG2_E,
    architecture,
    check_flat,
    launch_options,
    on_device,
)
from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed import backward, forward
from unfold.kernels.compressed.plan import KeyItems, KeyPlan, key_plan, key_rows, row_plan
from unfold.kernels.compressed.tiles import Tiles, choose_tiles
from unfold.kernels.intervals import Intervals

SUM_ROWS = 16  # keys of one program that adds up partial sums


def compressed_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float, tiles: Tiles | None = None
) -> Tensor:
    """As :func:`kernels.compressed.reference.compressed_attention_reference`, on a GPU, with memory linear in T.

    Args:
        q: [B, T, H, D]; k, v: [B, T, Hkv, D]; fp16, bf16 or fp32; D one of HEAD_DIMS. Copied if not contiguous.
        intervals: what each query sees; no token may have more than one visible sink copy.
        scale: factor on the scores.
        tiles: tile sizes other than the table's, for tests and measurements.

    Returns:
        [B, T, H, D] in q's dtype; zero where a query sees nothing.

    Raises:
        ValueError: a dtype, head dimension, device or GPU architecture that the kernels do not serve.
    """
    tiles = tiles or compressed_tiles(q)
    return _CompressedAttention.apply(q, k, v, intervals, scale, tiles)


def compressed_tiles(q: Tensor) -> Tiles:
    """The tiles for the device, head dimension and dtype of q; ValueError if there are no kernels for it."""
    dim = q.shape[-1]
    if q.dtype not in DTYPES:
        raise ValueError(f"q: dtype {q.dtype}; backend 'triton' serves fp16, bf16 and fp32, use backend='reference'")
    if dim not in HEAD_DIMS:
        raise ValueError(f"q: head dimension {dim} is not one of {HEAD_DIMS}; use one, or backend='reference'")
    return choose_tiles(architecture(q), max(64, triton.next_power_of_2(dim)), q.element_size())


def prepare(q: Tensor, k: Tensor, intervals: Intervals, backward: bool) -> None:
    """Make the plans of attention, and of its gradients if ``backward``; q [.., H, D], k [.., Hkv, D] of any length."""
    tiles, group = compressed_tiles(q), q.shape[-2] // k.shape[-2]
    key_rows(intervals)
    row_plan(intervals, group, tiles.forward.rows, tiles.forward.keys)
    if backward:
        row_plan(intervals, group, tiles.d_query.rows, tiles.d_query.keys)
        _key_plan(intervals, tiles)


def _key_plan(intervals: Intervals, tiles: Tiles) -> KeyPlan:
    return key_plan(intervals, tiles.sink.keys, tiles.top.keys, tiles.local.keys)


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float, tiles: Tiles) -> Tensor:
        q, k, v = q.contiguous(), *sort_keys(intervals, k, v)
        out, shift, factor = attend_sorted(q, k, v, intervals, scale, tiles)
        ctx.save_for_backward(q, k, v, out, shift, factor)
        ctx.intervals, ctx.scale, ctx.tiles = intervals, scale, tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, out, shift, factor = ctx.saved_tensors
        return *gradients(q, k, v, out, d_out.contiguous(), shift, factor, ctx.intervals, ctx.scale, ctx.tiles), None, None, None


def sort_keys(intervals: Intervals, *keys: Tensor) -> tuple[Tensor, ...]:
    """[B, T, Hkv, D] -> [B * R, Hkv, D], sorted by level."""
    check_flat(rows=intervals.rows, row_of=intervals.row_of, lo=intervals.lo, hi=intervals.hi)
    rows = key_rows(intervals)
    return tuple(x.reshape(-1, *x.shape[2:]).index_select(0, rows) for x in keys)


def attend_sorted(
    q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, T, H, D], and for backward shift and factor [B, Hkv, T * G] fp32; k and v are sorted by level."""
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[1]
    out = torch.empty_like(q)
    shift = torch.empty(batch, kv_heads, tokens * (heads // kv_heads), dtype=torch.float32, device=q.device)
    factor = torch.empty_like(shift) if q.dtype == torch.float32 else shift  # 16 bits need none
    plan = row_plan(intervals, heads // kv_heads, tiles.forward.rows, tiles.forward.keys)
    with on_device(q):
        forward.forward_kernel[plan.table.shape[1], kv_heads, batch](
            q, k, v, out, shift, factor, intervals.lo, intervals.hi, plan.table, scale * LOG2_E,
            tokens, intervals.rows.shape[1], **_sizes(q, k, intervals), **launch_options(tiles.forward),
        )  # fmt: skip
    return out, shift, factor


def gradients(
    q, k, v, out, d_out, shift, factor, intervals: Intervals, scale: float, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """d_q [B, T, H, D], d_k, d_v [B, T, Hkv, D] of :func:`attend_sorted`, whose arguments and results these are."""
    kv_heads, batch = k.shape[1], q.shape[0]
    mean, d_q = torch.empty_like(shift), torch.empty_like(q)
    plan = row_plan(intervals, q.shape[2] // kv_heads, tiles.d_query.rows, tiles.d_query.keys)
    with on_device(q):
        backward.d_query_kernel[plan.table.shape[1], kv_heads, batch](
            q, k, v, out, d_out, shift, factor, mean, d_q, intervals.lo, intervals.hi, plan.table,
            scale * LOG2_E, scale, q.shape[1], intervals.rows.shape[1],
            **_sizes(q, k, intervals), **launch_options(tiles.d_query),
        )  # fmt: skip
        return d_q, *_d_key_value(q, k, v, d_out, shift, factor, mean, intervals, scale, tiles)


def _d_key_value(q, k, v, d_out, shift, factor, mean, intervals: Intervals, scale: float, tiles: Tiles):
    """d_k, d_v [B, T, Hkv, D]; k, v are sorted by level, the row statistics [B, Hkv, T * G] fp32."""
    batch, tokens = q.shape[:2]
    kv_heads, dim = k.shape[1:]
    keys = intervals.rows.shape[1]
    plan = _key_plan(intervals, tiles)
    d_k, d_v = q.new_empty(2, batch, tokens, kv_heads, dim)
    new = lambda *shape: torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    copies = new(batch, keys - tokens, kv_heads, dim).unbind()
    parts = new(max(x.slots * x.tile_keys for x in (plan.sink, plan.top, plan.local)), kv_heads, dim).unbind()  # of each in turn
    sizes = _sizes(q, k, intervals)

    def run(items: KeyItems, tile: Tile, sink: bool) -> None:
        if len(items.items):
            backward.d_key_kernel[len(items.items), kv_heads](
                q, k, v, d_out, shift, factor, mean, intervals.rows, intervals.lo, intervals.hi, items.items, intervals.rows,
                plan.copy_of, *copies, d_k, d_v, *parts, scale * LOG2_E, scale, tokens, keys,
                COPIES=keys > tokens, APART=False, **sizes, **launch_options(tile),
            )  # fmt: skip
        if len(items.sums):
            backward.sum_parts_kernel[len(items.sums), kv_heads, items.tile_keys // SUM_ROWS](
                *parts, items.sums, intervals.rows, plan.copy_of, *copies, d_k, d_v, tokens, keys,
                HKV=kv_heads, D=dim, BD=sizes["BD"], BN=items.tile_keys, BR=SUM_ROWS, SINK=sink, COPIES=keys > tokens,
            )  # fmt: skip

    run(plan.sink, tiles.sink, True)
    run(plan.top, tiles.top, False)
    run(plan.local, tiles.local, False)
    return d_k, d_v


def _sizes(q: Tensor, k: Tensor, intervals: Intervals) -> dict[str, int | bool]:
    """Compile-time arguments that the attention kernels share."""
    return dict(
        H=q.shape[2], HKV=k.shape[1], D=q.shape[3], BD=triton.next_power_of_2(q.shape[3]), S=intervals.segments,
        EXACT=q.dtype == torch.float32, UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
