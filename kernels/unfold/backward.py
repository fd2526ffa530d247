"""The backward kernels of unfolding: d_q by blocks of queries; d_k, d_v by chunks, and by groups of gists above level 0.

What windows and sinks contribute to d_k and d_v is attention over ranges: the kernel of compressed attention does it.
"""

import triton
import triton.language as tl

from unfold.kernels.common.tl import d_query_step, dot, kernel, load_tile, mean_step, store_tile
from unfold.kernels.unfold.common import block_rows, listed_tile, near_spans, near_tile


@triton.jit
def _step(
    b_sum_or_dq, b_mean, b_q, b_do, b_shift, p_k, p_v, o_key, m_seen, scale,
    stride: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MEAN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys: to the mean and the sum of weights, or to d_q."""
    b_k = load_tile(p_k, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
    b_v = load_tile(p_v, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
    if MEAN:
        b_mean, b_sum_or_dq = mean_step(
            b_mean, b_sum_or_dq, b_q, b_do, b_shift, b_k, b_v, m_seen, scale, True, UPCAST
        )  # fmt: skip
    else:
        b_sum_or_dq = d_query_step(b_sum_or_dq, b_q, b_do, b_shift, b_mean, b_k, b_v, m_seen, scale, True, UPCAST)
    return b_sum_or_dq, b_mean


@triton.jit
def _visit(
    b_sum_or_dq, b_mean, b_q, b_do, b_shift, p_k, p_v, p_lo, p_hi, p_first, p_row, p_bits, p_start, p_key, p_seen,
    i_list, lists, o_query, m_row, o_bit, scale, queries,
    stride: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BN: tl.constexpr,
    MEAN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """:func:`_step` for every tile that the block visits, in the order of the forward kernel."""
    b_lo, b_hi, b_slo, b_shi, i_window, window, i_sinks, sinks = near_spans(p_lo, p_hi, o_query, m_row, queries, L)
    for i in range(0, window + sinks, BN):
        o_key, m_seen = near_tile(i, b_lo, b_hi, b_slo, b_shi, i_window, window, i_sinks, sinks, BN)
        b_sum_or_dq, b_mean = _step(
            b_sum_or_dq, b_mean, b_q, b_do, b_shift, p_k, p_v, o_key, m_seen, scale, stride, D, BD, MEAN, UPCAST
        )
    for s in tl.static_range(L - 1):
        i_first = tl.load(p_first + s * (lists + 1) + i_list)
        items = (tl.load(p_first + s * (lists + 1) + i_list + 1) - i_first).to(tl.int32)
        for i in range(0, items, BN):
            o_key, m_seen = listed_tile(p_row + i_first, p_bits + i_first, i, items, o_bit, BN)
            b_sum_or_dq, b_mean = _step(
                b_sum_or_dq, b_mean, b_q, b_do, b_shift, p_k, p_v, o_key, m_seen, scale, stride, D, BD, MEAN, UPCAST
            )
    i_start = tl.load(p_start + i_list)
    places = (tl.load(p_start + i_list + 1) - i_start).to(tl.int32)
    for i in range(0, places, BN):
        o_key, m_seen = listed_tile(p_key + i_start, p_seen + i_start, i, places, o_bit, BN)
        b_sum_or_dq, b_mean = _step(
            b_sum_or_dq, b_mean, b_q, b_do, b_shift, p_k, p_v, o_key, m_seen, scale, stride, D, BD, MEAN, UPCAST
        )
    return b_sum_or_dq, b_mean


@kernel
def unfold_d_query_kernel(
    p_q, p_k, p_v, p_out, p_do, p_shift, p_factor, p_mean, p_dq, p_lo, p_hi, p_blocks, p_first, p_row, p_bits, p_start,
    p_key, p_seen, scale, d_scale, queries, keys, tokens,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_q [N, H, D], and the weighted mean of d_out . v of each row [HKV, N * G], as in compressed attention.

    Grid: (blocks, HKV).
    """
    blocks = tl.num_programs(0)
    i_block, i_head = blocks - 1 - tl.program_id(0), tl.program_id(1)
    i_sample, m_row, o_query, o_bit, o_q, o_stat = block_rows(p_blocks, i_block, i_head, queries, H, HKV, D, BM)
    b_q = load_tile(p_q, o_q, m_row, D, BD)
    b_do = load_tile(p_do, o_q, m_row, D, BD)
    b_shift = tl.load(p_shift + o_stat, mask=m_row, other=0.0)
    stride: tl.constexpr = HKV * D
    o_head = i_sample.to(tl.int64) * keys * stride + i_head * D
    p_k += o_head
    p_v += o_head
    i_list, lists = i_block * HKV + i_head, blocks * HKV
    b_mean = tl.zeros([BM], tl.float32)
    if EXACT:
        b_sum, b_mean = _visit(
            tl.zeros([BM], tl.float32), b_mean, b_q, b_do, b_shift, p_k, p_v, p_lo, p_hi, p_first, p_row, p_bits, p_start,
            p_key, p_seen, i_list, lists, o_query, m_row, o_bit, scale, queries, stride, D, BD, L, BN, True, UPCAST,
        )  # fmt: skip
        b_mean = tl.div_rn(b_mean, tl.where(b_sum > 0, b_sum, 1.0))
    else:
        b_out = load_tile(p_out, o_q, m_row, D, BD)
        b_mean = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_mean + o_stat, b_mean, mask=m_row)
    b_dq, _ = _visit(
        tl.zeros([BM, BD], tl.float32), b_mean, b_q, b_do, b_shift, p_k, p_v, p_lo, p_hi, p_first, p_row, p_bits, p_start,
        p_key, p_seen, i_list, lists, o_query, m_row, o_bit, scale, queries, stride, D, BD, L, BN, False, UPCAST,
    )  # fmt: skip
    if EXACT:  # the row's factor is common to all its keys: it comes in once, here
        b_dq *= tl.load(p_factor + o_stat, mask=m_row, other=0.0)[:, None]
    store_tile(p_dq, o_q, m_row, b_dq * d_scale, D, BD)


@triton.jit
def _group_keys(p_child_lo, p_child_hi, i_sample, i_row, o_slot, keys, tokens, CHUNK: tl.constexpr):
    """Key row of every slot of a group that begins in row i_row, and whether there is one."""
    if CHUNK:
        o_child = i_sample.to(tl.int64) * tokens + i_row
        i_child = tl.load(p_child_lo + o_child)
        return tl.where(o_slot == 0, i_row, i_child + o_slot - 1), o_slot <= tl.load(p_child_hi + o_child) - i_child
    else:
        return i_row + o_slot, i_row + o_slot < keys


@triton.jit
def _bits_of_keys(p_row, p_bits, i_first, i_last, o_key):
    """Bits of every key of a group from the items of one block."""
    b_bits = tl.zeros([o_key.shape[0]], tl.int32)
    for i in range(i_first, i_last):
        b_bits |= tl.where(o_key == tl.load(p_row + i), tl.load(p_bits + i), 0)
    return b_bits


@triton.jit
def _add_rows(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_shift, p_factor, p_mean, o_q, o_stat, m_row, m_seen, scale,
    D: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add a tile of query rows to d_k and d_v; everything is transposed, m_seen too: [keys, rows]."""
    b_q = load_tile(p_q, o_q, m_row, D, BD)
    b_do = load_tile(p_do, o_q, m_row, D, BD)
    b_shift = tl.load(p_shift + o_stat, mask=m_row, other=0.0)
    b_mean = tl.load(p_mean + o_stat, mask=m_row, other=0.0)
    b_p = tl.exp2(dot(b_k, tl.trans(b_q), UPCAST) * scale - b_shift[None, :])
    if EXACT:
        b_p *= tl.load(p_factor + o_stat, mask=m_row, other=0.0)[None, :]
    b_p = tl.where(m_seen, b_p, 0.0)
    b_dv += dot(b_p.to(b_do.dtype), b_do, UPCAST)
    b_ds = tl.where(b_p > 0, b_p * (dot(b_v, tl.trans(b_do), UPCAST) - b_mean[None, :]), 0.0)
    return b_dk + dot(b_ds.to(b_q.dtype), b_q, UPCAST), b_dv


@triton.jit
def _write_part(
    p_dk, p_dv, p_part_k, p_part_v, i_slot, o_slot, o_k, m_key, b_dk, b_dv, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Add to d_k, d_v where a program has all of a group of keys, else write partial sums."""
    if i_slot >= 0:
        o_part = (i_slot.to(tl.int64) * BN + o_slot) * D
        store_tile(p_part_k, o_part, m_key, b_dk, D, BD)
        store_tile(p_part_v, o_part, m_key, b_dv, D, BD)
    else:  # no other program has this group
        store_tile(p_dk, o_k, m_key, b_dk + load_tile(p_dk, o_k, m_key, D, BD), D, BD)
        store_tile(p_dv, o_k, m_key, b_dv + load_tile(p_dv, o_k, m_key, D, BD), D, BD)


@kernel
def list_queries_kernel(p_bits, p_block, p_blocks, p_end, p_query, items, SIZE: tl.constexpr, BN: tl.constexpr):
    """The queries of every item, side by side: those whose bits are set. p_end [items] int64: where an item's end.

    Grid: (items / BN,).
    """
    o_item = tl.program_id(0) * BN + tl.arange(0, BN)
    m_item = o_item < items
    b_bits = tl.load(p_bits + o_item, mask=m_item, other=0)
    i_first = tl.load(p_blocks + tl.load(p_block + o_item, mask=m_item, other=0) * 3)
    o_to = tl.load(p_end + o_item - 1, mask=m_item & (o_item > 0), other=0)
    for j in tl.static_range(SIZE):
        b_bit = (b_bits >> j) & 1
        tl.store(p_query + o_to, i_first + j, mask=b_bit > 0)
        o_to += b_bit


@kernel
def chunk_d_key_kernel(
    p_q, p_k, p_v, p_do, p_shift, p_factor, p_mean, p_lo, p_parts, p_query, p_child_lo, p_child_hi,
    p_dk, p_dv, p_part_k, p_part_v, scale, d_scale, queries, keys, tokens,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds to d_k, d_v [B * R, HKV, D] fp32, or writes partial sums [slots, BN, D]: a level-0 gist and the raw tokens behind it.

    From exactly the queries that selected it, with the heads of its KV head's group: BM // G queries a tile.
    p_parts [parts, 6]: sample, KV head, row of the gist, first of its queries in p_query, last + 1, slot or -1. Grid: (parts,).
    """
    G: tl.constexpr = H // HKV
    p_parts += tl.program_id(0).to(tl.int64) * 6
    i_sample, i_head, i_row = tl.load(p_parts), tl.load(p_parts + 1), tl.load(p_parts + 2)
    i_first, i_last, i_slot = tl.load(p_parts + 3), tl.load(p_parts + 4), tl.load(p_parts + 5)
    o_slot = tl.arange(0, BN)
    o_key, m_key = _group_keys(p_child_lo, p_child_hi, i_sample, i_row, o_slot, keys, tokens, True)
    o_k = (i_sample.to(tl.int64) * keys + o_key) * (HKV * D) + i_head * D
    b_k = load_tile(p_k, o_k, m_key, D, BD)
    b_v = load_tile(p_v, o_k, m_key, D, BD)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    o_row = tl.arange(0, BM)
    for i in range(i_first, i_last, BM // G):
        o_index = i + o_row // G
        m_row = (o_row < BM // G * G) & (o_index < i_last)
        o_query = tl.load(p_query + o_index, mask=m_row, other=0)
        o_q = o_query.to(tl.int64) * (H * D) + (i_head * G + o_row % G) * D
        o_stat = (i_head.to(tl.int64) * queries + o_query) * G + o_row % G
        b_lo = tl.load(p_lo + L * queries + o_query, mask=m_row, other=0)  # what lies in the window counts there
        m_seen = m_key[:, None] & m_row[None, :] & (o_key[:, None] < b_lo[None, :])
        b_dk, b_dv = _add_rows(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_shift, p_factor, p_mean, o_q, o_stat, m_row, m_seen, scale, D, BD, EXACT, UPCAST
        )
    _write_part(p_dk, p_dv, p_part_k, p_part_v, i_slot, o_slot, o_k, m_key, b_dk * d_scale, b_dv, D, BD, BN)


@kernel
def upper_d_key_kernel(
    p_q, p_k, p_v, p_do, p_shift, p_factor, p_mean, p_blocks, p_parts, p_visits, p_row, p_bits,
    p_dk, p_dv, p_part_k, p_part_v, scale, d_scale, queries, keys, tokens,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same for BN neighbouring gists above level 0, of which blocks of queries select many at once: visited by blocks.

    p_parts [parts, 6]: sample, KV head, first key row, first visit, last + 1, slot or -1. p_visits [visits, 3]: block, first
    item of p_row and p_bits, last + 1. Grid: (parts,).
    """
    p_parts += tl.program_id(0).to(tl.int64) * 6
    i_sample, i_head, i_row = tl.load(p_parts), tl.load(p_parts + 1), tl.load(p_parts + 2)
    i_first, i_last, i_slot = tl.load(p_parts + 3), tl.load(p_parts + 4), tl.load(p_parts + 5)
    o_slot = tl.arange(0, BN)
    o_key, m_key = i_row + o_slot, i_row + o_slot < keys
    o_k = (i_sample.to(tl.int64) * keys + o_key) * (HKV * D) + i_head * D
    b_k = load_tile(p_k, o_k, m_key, D, BD)
    b_v = load_tile(p_v, o_k, m_key, D, BD)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    for i in range(i_first, i_last):
        i_block = tl.load(p_visits + i * 3)
        b_bits = _bits_of_keys(p_row, p_bits, tl.load(p_visits + i * 3 + 1), tl.load(p_visits + i * 3 + 2), o_key)
        _, m_row, o_query, o_bit, o_q, o_stat = block_rows(p_blocks, i_block, i_head, queries, H, HKV, D, BM)
        m_seen = m_key[:, None] & (((b_bits[:, None] >> o_bit[None, :]) & 1) != 0)
        b_dk, b_dv = _add_rows(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_shift, p_factor, p_mean, o_q, o_stat, m_row, m_seen, scale, D, BD, EXACT, UPCAST
        )
    _write_part(p_dk, p_dv, p_part_k, p_part_v, i_slot, o_slot, o_k, m_key, b_dk * d_scale, b_dv, D, BD, BN)


@kernel
def add_parts_kernel(
    p_part_k, p_part_v, p_sums, p_child_lo, p_child_hi, p_dk, p_dv, keys, tokens,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of a group to d_k, d_v, always in the same order.

    p_sums [groups, 5]: sample, KV head, first key row, first slot, number of slots. Grid: (groups, BN / 16).
    """
    p_sums += tl.program_id(0).to(tl.int64) * 5
    i_sample, i_head, i_row = tl.load(p_sums), tl.load(p_sums + 1), tl.load(p_sums + 2)
    i_slot, slots = tl.load(p_sums + 3), tl.load(p_sums + 4)
    o_slot = tl.program_id(1) * 16 + tl.arange(0, 16)
    o_key, m_key = _group_keys(p_child_lo, p_child_hi, i_sample, i_row, o_slot, keys, tokens, CHUNK)
    o_k = (i_sample.to(tl.int64) * keys + o_key) * (HKV * D) + i_head * D
    b_dk = load_tile(p_dk, o_k, m_key, D, BD)
    b_dv = load_tile(p_dv, o_k, m_key, D, BD)
    for i in range(0, slots):
        o_part = ((i_slot + i).to(tl.int64) * BN + o_slot) * D
        b_dk += load_tile(p_part_k, o_part, m_key, D, BD)
        b_dv += load_tile(p_part_v, o_part, m_key, D, BD)
    store_tile(p_dk, o_k, m_key, b_dk, D, BD)
    store_tile(p_dv, o_k, m_key, b_dv, D, BD)
