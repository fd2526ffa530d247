"""The backward kernels of compressed attention: d_q by blocks of rows, d_k and d_v by blocks of keys, and their partial sums."""

import triton
import triton.language as tl

from unfold.kernels.common.tl import (
    d_query_step,
    dot,
    in_range,
    kernel,
    listed_keys,
    load_full_tile,
    load_tile,
    mean_step,
    row_offsets,
    seen_places,
    store_tile,
)


@kernel
def d_query_kernel(
    p_q, p_k, p_v, p_out, p_do, p_shift, p_factor, p_mean, p_dq, p_lo, p_hi, p_plan, scale, d_scale, tokens, keys,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_q [B, T, H, D], and for the next kernel the weighted mean of d_out . v of each row [B, HKV, T * G].

    That mean equals d_out . out but for rounding. EXACT takes it from the very weights and products that it is used
    with, at the price of two more products per tile: without it fp32 gradients would be half as exact as plain PyTorch's.
    Grid: (blocks, HKV, B), with the plan of the forward kernel at this kernel's tiles.
    """
    blocks = tl.num_programs(0)
    i_block = blocks - 1 - tl.program_id(0)
    i_head, i_sample = tl.program_id(1), tl.program_id(2)
    rows = tokens * (H // HKV)
    o_row = i_block * BM + tl.arange(0, BM)
    m_row = o_row < rows
    o_q = row_offsets(i_sample, i_head, o_row, tokens, H, HKV, D)
    o_stat = (i_sample.to(tl.int64) * HKV + i_head) * rows + o_row
    o_token = o_row // (H // HKV)
    b_q = load_tile(p_q, o_q, m_row, D, BD)
    b_do = load_tile(p_do, o_q, m_row, D, BD)
    b_shift = tl.load(p_shift + o_stat, mask=m_row, other=0.0)

    stride: tl.constexpr = HKV * D
    o_head = i_sample.to(tl.int64) * keys * stride + i_head * D
    p_k += o_head
    p_v += o_head
    p_lo += i_sample.to(tl.int64) * S * tokens
    p_hi += i_sample.to(tl.int64) * S * tokens
    p_plan += (i_sample.to(tl.int64) * blocks + i_block) * (3 + 2 * S)
    i_full, full, listed = tl.load(p_plan), tl.load(p_plan + 1), tl.load(p_plan + 2)

    if EXACT:
        b_mean = tl.zeros([BM], tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        for i in range(0, full):
            b_k = load_full_tile(p_k, i_full + i * BN, BN, stride, D, BD)
            b_v = load_full_tile(p_v, i_full + i * BN, BN, stride, D, BD)
            b_mean, b_sum = mean_step(b_mean, b_sum, b_q, b_do, b_shift, b_k, b_v, None, scale, False, UPCAST)
        for i in range(0, listed, BN):
            o_place = i + tl.arange(0, BN)
            o_key = listed_keys(p_plan, o_place, S)
            b_k = load_tile(p_k, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
            b_v = load_tile(p_v, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
            m_seen = seen_places(p_plan, p_lo, p_hi, o_token, m_row, o_place, tokens, S)
            b_mean, b_sum = mean_step(b_mean, b_sum, b_q, b_do, b_shift, b_k, b_v, m_seen, scale, True, UPCAST)
        b_mean = tl.div_rn(b_mean, tl.where(b_sum > 0, b_sum, 1.0))
    else:
        b_out = load_tile(p_out, o_q, m_row, D, BD)
        b_mean = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_mean + o_stat, b_mean, mask=m_row)

    b_dq = tl.zeros([BM, BD], tl.float32)
    for i in range(0, full):
        b_k = load_full_tile(p_k, i_full + i * BN, BN, stride, D, BD)
        b_v = load_full_tile(p_v, i_full + i * BN, BN, stride, D, BD)
        b_dq = d_query_step(b_dq, b_q, b_do, b_shift, b_mean, b_k, b_v, None, scale, False, UPCAST)
    for i in range(0, listed, BN):
        o_place = i + tl.arange(0, BN)
        o_key = listed_keys(p_plan, o_place, S)
        b_k = load_tile(p_k, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
        b_v = load_tile(p_v, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
        m_seen = seen_places(p_plan, p_lo, p_hi, o_token, m_row, o_place, tokens, S)
        b_dq = d_query_step(b_dq, b_q, b_do, b_shift, b_mean, b_k, b_v, m_seen, scale, True, UPCAST)
    if EXACT:  # the row's factor is common to all its keys: it comes in once, here
        b_dq *= tl.load(p_factor + o_stat, mask=m_row, other=0.0)[:, None]
    store_tile(p_dq, o_q, m_row, b_dq * d_scale, D, BD)


@triton.jit
def _write_key_gradient(
    p_d, p_copy, p_rows, p_copy_of, i_sample, i_head, o_key, m_key, b_d, tokens, keys,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Store [n, BD] to the tokens of keys, the gradient of a token's sink copy added; one rounding in all."""
    o_token = tl.load(p_rows + i_sample.to(tl.int64) * keys + o_key, mask=m_key, other=0)
    if COPIES:
        o_copy = tl.load(p_copy_of + i_sample.to(tl.int64) * tokens + o_key, mask=m_key, other=-1)
        o_sum = (i_sample.to(tl.int64) * (keys - tokens) + o_copy) * (HKV * D) + i_head * D
        b_d += load_tile(p_copy, o_sum, o_copy >= 0, D, BD)
    o_d = (i_sample.to(tl.int64) * tokens + o_token) * (HKV * D) + i_head * D
    store_tile(p_d, o_d, m_key, b_d, D, BD)


@triton.jit
def _d_key_step(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_shift, p_factor, p_mean, p_tokens, p_lo, p_hi,
    i_sample, i_head, o_row, m_row, o_key, tokens, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    MASKED: tl.constexpr, APART: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one tile of rows; everything is transposed, [keys, rows], so that the weights need no transposing."""
    if APART:
        o_token = tl.load(p_tokens + o_row // (H // HKV), mask=m_row, other=0)
        o_q = o_token * (H * D) + (i_head * (H // HKV) + o_row % (H // HKV)) * D
    else:
        o_q = row_offsets(i_sample, i_head, o_row, tokens, H, HKV, D)
    b_q = load_tile(p_q, o_q, m_row, D, BD)
    b_do = load_tile(p_do, o_q, m_row, D, BD)
    b_shift = tl.load(p_shift + o_row, mask=m_row, other=0.0)
    b_mean = tl.load(p_mean + o_row, mask=m_row, other=0.0)
    b_p = tl.exp2(dot(b_k, tl.trans(b_q), UPCAST) * scale - b_shift[None, :])
    if EXACT:
        b_p *= tl.load(p_factor + o_row, mask=m_row, other=0.0)[None, :]
    if MASKED:
        b_lo = tl.load(p_lo + o_row // (H // HKV), mask=m_row, other=0)
        b_hi = tl.load(p_hi + o_row // (H // HKV), mask=m_row, other=0)
        b_p = tl.where(in_range(o_key[:, None], b_lo[None, :], b_hi[None, :]), b_p, 0.0)
    b_dv += dot(b_p.to(b_do.dtype), b_do, UPCAST)
    b_ds = b_p * (dot(b_v, tl.trans(b_do), UPCAST) - b_mean[None, :])
    if MASKED:
        b_ds = tl.where(b_p > 0, b_ds, 0.0)
    b_dk += dot(b_ds.to(b_q.dtype), b_q, UPCAST)
    return b_dk, b_dv


@kernel
def d_key_kernel(
    p_q, p_k, p_v, p_do, p_shift, p_factor, p_mean, p_tokens, p_lo, p_hi, p_items, p_rows, p_copy_of, p_copy_k, p_copy_v,
    p_dk, p_dv, p_part_k, p_part_v, scale, d_scale, tokens, keys,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, COPIES: tl.constexpr, APART: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_k, d_v [B, T, HKV, D] of the blocks of one item, or their partial sums [slots, HKV, BN, D]. Grid: (items, HKV).

    APART: of one sample, whose queries p_tokens [T] int64 finds among those of p_q and p_do.
    """
    i_item, i_head = tl.program_id(0), tl.program_id(1)
    p_items += i_item.to(tl.int64) * 8
    i_sample, i_segment, i_first, i_last = (
        tl.load(p_items), tl.load(p_items + 1), tl.load(p_items + 2), tl.load(p_items + 3)
    )  # fmt: skip
    row_first, row_full, row_last = (
        tl.load(p_items + 4) * (H // HKV), tl.load(p_items + 5) * (H // HKV), tl.load(p_items + 6) * (H // HKV)
    )  # fmt: skip
    i_slot = tl.load(p_items + 7)
    o_key = i_first + tl.arange(0, BN)
    m_key = o_key < i_last
    o_k = (i_sample.to(tl.int64) * keys + o_key) * (HKV * D) + i_head * D
    b_k = load_tile(p_k, o_k, m_key, D, BD)
    b_v = load_tile(p_v, o_k, m_key, D, BD)
    o_stat = (i_sample.to(tl.int64) * HKV + i_head) * tokens * (H // HKV)
    p_shift += o_stat
    p_factor += o_stat
    p_mean += o_stat
    o_bound = (i_sample.to(tl.int64) * S + i_segment) * tokens
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    for i in range(row_first, row_full, BM):
        o_row = i + tl.arange(0, BM)
        b_dk, b_dv = _d_key_step(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_shift, p_factor, p_mean, p_tokens, p_lo + o_bound, p_hi + o_bound, i_sample,
            i_head, o_row, o_row < row_full, o_key, tokens, scale, H, HKV, D, BD, True, APART, EXACT, UPCAST,
        )  # fmt: skip
    for i in range(row_full, row_last, BM):
        o_row = i + tl.arange(0, BM)
        b_dk, b_dv = _d_key_step(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_shift, p_factor, p_mean, p_tokens, p_lo + o_bound, p_hi + o_bound, i_sample,
            i_head, o_row, o_row < row_last, o_key, tokens, scale, H, HKV, D, BD, False, APART, EXACT, UPCAST,
        )  # fmt: skip
    b_dk *= d_scale
    if i_slot >= 0:
        o_part = ((i_slot.to(tl.int64) * HKV + i_head) * BN + tl.arange(0, BN)) * D
        store_tile(p_part_k, o_part, m_key, b_dk, D, BD)
        store_tile(p_part_v, o_part, m_key, b_dv, D, BD)
    else:
        _write_key_gradient(
            p_dk, p_copy_k, p_rows, p_copy_of, i_sample, i_head, o_key, m_key, b_dk, tokens, keys, HKV, D, BD, COPIES
        )
        _write_key_gradient(
            p_dv, p_copy_v, p_rows, p_copy_of, i_sample, i_head, o_key, m_key, b_dv, tokens, keys, HKV, D, BD, COPIES
        )


@kernel
def sum_parts_kernel(
    p_part_k, p_part_v, p_sums, p_rows, p_copy_of, p_copy_k, p_copy_v, p_dk, p_dv, tokens, keys,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    SINK: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Add up partial sums, always in the same order. Grid: (blocks with partial sums, HKV, BN / BR).

    SINK: into the sink copies' own sums [B, R - T, HKV, D] fp32, which the other blocks add to their tokens; else into d_k, d_v.
    """
    i_head = tl.program_id(1)
    p_sums += tl.program_id(0).to(tl.int64) * 5
    i_sample, i_first, i_last = tl.load(p_sums), tl.load(p_sums + 1), tl.load(p_sums + 2)
    i_slot, slots = tl.load(p_sums + 3), tl.load(p_sums + 4)
    o_local = tl.program_id(2) * BR + tl.arange(0, BR)
    o_key = i_first + o_local
    m_key = o_key < i_last
    b_dk = tl.zeros([BR, BD], tl.float32)
    b_dv = tl.zeros([BR, BD], tl.float32)
    for i in range(0, slots):
        o_part = (((i_slot + i).to(tl.int64) * HKV + i_head) * BN + o_local) * D
        b_dk += load_tile(p_part_k, o_part, m_key, D, BD)
        b_dv += load_tile(p_part_v, o_part, m_key, D, BD)
    if SINK:
        o_copy = (i_sample.to(tl.int64) * (keys - tokens) + o_key - tokens) * (HKV * D) + i_head * D
        store_tile(p_copy_k, o_copy, m_key, b_dk, D, BD)
        store_tile(p_copy_v, o_copy, m_key, b_dv, D, BD)
    else:
        _write_key_gradient(
            p_dk, p_copy_k, p_rows, p_copy_of, i_sample, i_head, o_key, m_key, b_dk, tokens, keys, HKV, D, BD, COPIES
        )
        _write_key_gradient(
            p_dv, p_copy_v, p_rows, p_copy_of, i_sample, i_head, o_key, m_key, b_dv, tokens, keys, HKV, D, BD, COPIES
        )
