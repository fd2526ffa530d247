"""The backward kernels of unfolding: d_q by blocks of queries; d_k, d_v by chunks, and by groups of gists above level 0.

What windows and sinks contribute to d_k and d_v is attention over ranges: the kernel of compressed attention does it.
"""

import triton
import triton.language as tl

from unfold.kernels.common.tl import d_query_step, dot, kernel, load_tile, mean_step, store_tile
from unfold.kernels.unfold.common import block_rows, listed_tile, near_spans, near_tile
from unfold.kernels.unfold.turn import parts_of, work_of


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
    b_sum_or_dq, b_mean, b_q, b_do, b_shift, p_k, p_v, p_lo, p_hi, p_first, p_count, p_row, p_bits, p_start, p_key, p_seen,
    i_list, i_base, lists, o_query, m_row, o_bit, scale, queries,
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
        i_first = tl.load(p_first + s * lists + i_list)
        items = tl.load(p_count + s * lists + i_list)
        for i in range(0, items, BN):
            o_key, m_seen = listed_tile(p_row + i_first, p_bits + i_first, i, items, o_bit, BN)
            b_sum_or_dq, b_mean = _step(
                b_sum_or_dq, b_mean, b_q, b_do, b_shift, p_k, p_v, o_key, m_seen, scale, stride, D, BD, MEAN, UPCAST
            )
    i_start = tl.load(p_start + i_list) - tl.load(p_start + i_base)
    places = tl.load(p_count + L * lists + i_list)
    for i in range(0, places, BN):
        o_key, m_seen = listed_tile(p_key + i_start, p_seen + i_start, i, places, o_bit, BN)
        b_sum_or_dq, b_mean = _step(
            b_sum_or_dq, b_mean, b_q, b_do, b_shift, p_k, p_v, o_key, m_seen, scale, stride, D, BD, MEAN, UPCAST
        )
    return b_sum_or_dq, b_mean


@kernel
def unfold_d_query_kernel(
    p_q, p_k, p_v, p_out, p_do, p_shift, p_factor, p_mean, p_dq, p_tokens, p_lo, p_hi, p_blocks, p_first, p_count, p_row,
    p_bits, p_start, p_key, p_seen, scale, d_scale, i_from, queries, keys, lists,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_q [.., H, D] at p_tokens, and the weighted mean of d_out . v of each row [HKV, N * G], as in compressed attention.

    Grid: (blocks from i_from on, HKV).
    """
    i_block, i_head = i_from + tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_sample, m_row, o_query, o_bit, o_q, o_stat = block_rows(p_blocks, p_tokens, i_block, i_head, queries, H, HKV, D, BM)
    b_q = load_tile(p_q, o_q, m_row, D, BD)
    b_do = load_tile(p_do, o_q, m_row, D, BD)
    b_shift = tl.load(p_shift + o_stat, mask=m_row, other=0.0)
    stride: tl.constexpr = HKV * D
    o_head = i_sample.to(tl.int64) * keys * stride + i_head * D
    p_k += o_head
    p_v += o_head
    i_list = i_block * HKV + i_head
    b_mean = tl.zeros([BM], tl.float32)
    if EXACT:
        b_sum, b_mean = _visit(
            tl.zeros([BM], tl.float32), b_mean, b_q, b_do, b_shift, p_k, p_v, p_lo, p_hi, p_first, p_count, p_row, p_bits,
            p_start, p_key, p_seen, i_list, i_from * HKV, lists, o_query, m_row, o_bit, scale, queries, stride, D, BD, L, BN,
            True, UPCAST,
        )  # fmt: skip
        b_mean = tl.div_rn(b_mean, tl.where(b_sum > 0, b_sum, 1.0))
    else:
        b_out = load_tile(p_out, o_q, m_row, D, BD)
        b_mean = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_mean + o_stat, b_mean, mask=m_row)
    b_dq, _ = _visit(
        tl.zeros([BM, BD], tl.float32), b_mean, b_q, b_do, b_shift, p_k, p_v, p_lo, p_hi, p_first, p_count, p_row, p_bits,
        p_start, p_key, p_seen, i_list, i_from * HKV, lists, o_query, m_row, o_bit, scale, queries, stride, D, BD, L, BN,
        False, UPCAST,
    )  # fmt: skip
    if EXACT:  # the row's factor is common to all its keys: it comes in once, here
        b_dq *= tl.load(p_factor + o_stat, mask=m_row, other=0.0)[:, None]
    store_tile(p_dq, o_q, m_row, b_dq * d_scale, D, BD)


@triton.jit
def _chunk_keys(p_child_lo, p_child_hi, i_sample, i_row, o_slot, tokens):
    """Key row of every slot of a chunk whose gist stands in row i_row, and whether there is one."""
    o_child = i_sample.to(tl.int64) * tokens + i_row
    i_child = tl.load(p_child_lo + o_child)
    return tl.where(o_slot == 0, i_row, i_child + o_slot - 1), o_slot <= tl.load(p_child_hi + o_child) - i_child


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
def chunk_d_key_kernel(
    p_q, p_k, p_v, p_do, p_shift, p_factor, p_mean, p_tokens, p_lo, p_end, p_query, p_starts, p_child_lo, p_child_hi,
    p_dk, p_dv, p_part_k, p_part_v, scale, d_scale, queries, keys, tokens, batch, groups, slots, most,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SHORT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds to d_k, d_v [B * R, HKV, D] fp32, or writes partial sums [slots, BN, D]: a level-0 gist and the raw tokens behind it.

    From exactly the queries that selected it, with the heads of its KV head's group: BM // G queries a tile. p_end
    [HKV * B * groups] int64: where the queries of each chunk end in p_query; chunks of many are cut (kernels/unfold/turn.py).
    p_starts [B, L + 3]: first rows of segments. Grid: (slots, then chunks that are not cut,).
    """
    G: tl.constexpr = H // HKV
    i_group, i_slot, i_first, n = work_of(p_end, HKV * batch * groups, slots, most, tl.program_id(0), BN, SHORT)
    if n > 0:
        i_head, i_sample = i_group // groups // batch, i_group // groups % batch
        i_row = tl.load(p_starts + i_sample * (L + 3) + L - 1) + i_group % groups
        o_slot = tl.arange(0, BN)
        o_key, m_key = _chunk_keys(p_child_lo, p_child_hi, i_sample, i_row, o_slot, tokens)
        o_k = (i_sample.to(tl.int64) * keys + o_key) * (HKV * D) + i_head * D
        o_near = tl.where(o_key < tokens, o_key, -1)  # no window holds what stands apart
        b_k = load_tile(p_k, o_k, m_key, D, BD)
        b_v = load_tile(p_v, o_k, m_key, D, BD)
        b_dk = tl.zeros([BN, BD], tl.float32)
        b_dv = tl.zeros([BN, BD], tl.float32)
        o_row = tl.arange(0, BM)
        p_query += i_first
        for i in range(0, n, BM // G):
            o_index = i + o_row // G
            m_row = (o_row < BM // G * G) & (o_index < n)
            o_query = tl.load(p_query + o_index, mask=m_row, other=0)
            o_q = tl.load(p_tokens + o_query, mask=m_row, other=0) * (H * D) + (i_head * G + o_row % G) * D
            o_stat = (i_head.to(tl.int64) * queries + o_query) * G + o_row % G
            b_lo = tl.load(p_lo + L * queries + o_query, mask=m_row, other=0)  # what lies in the window counts there
            m_seen = m_key[:, None] & m_row[None, :] & (o_near[:, None] < b_lo[None, :])
            b_dk, b_dv = _add_rows(
                b_dk, b_dv, b_k, b_v, p_q, p_do, p_shift, p_factor, p_mean, o_q, o_stat, m_row, m_seen, scale, D, BD, EXACT,
                UPCAST,
            )  # fmt: skip
        _write_part(p_dk, p_dv, p_part_k, p_part_v, i_slot, o_slot, o_k, m_key, b_dk * d_scale, b_dv, D, BD, BN)


@kernel
def add_chunks_kernel(
    p_part_k, p_part_v, p_end, p_starts, p_child_lo, p_child_hi, p_dk, p_dv, keys, tokens, batch, groups, slots, most,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of a chunk to d_k, d_v, always in the same order. Grid: (slots, BN / 16)."""
    all_groups = HKV * batch * groups
    i_slot = tl.program_id(0)
    i_group, _, _, n = work_of(p_end, all_groups, slots, most, i_slot, BN, SHORT)
    if n > 0:
        i_begin, parts = parts_of(p_end, all_groups, i_group, most, BN, SHORT)
        if i_begin == i_slot:
            i_head, i_sample = i_group // groups // batch, i_group // groups % batch
            i_row = tl.load(p_starts + i_sample * (L + 3) + L - 1) + i_group % groups
            o_slot = tl.program_id(1) * 16 + tl.arange(0, 16)
            o_key, m_key = _chunk_keys(p_child_lo, p_child_hi, i_sample, i_row, o_slot, tokens)
            o_k = (i_sample.to(tl.int64) * keys + o_key) * (HKV * D) + i_head * D
            _add_parts(p_dk, p_dv, p_part_k, p_part_v, i_slot, parts, 1, o_slot, o_k, m_key, D, BD, BN)


@triton.jit
def _add_parts(
    p_dk, p_dv, p_part_k, p_part_v, i_slot, parts, step, o_slot, o_k, m_key, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Add partial sums, ``step`` slots apart, to rows of d_k, d_v."""
    b_dk = load_tile(p_dk, o_k, m_key, D, BD)
    b_dv = load_tile(p_dv, o_k, m_key, D, BD)
    for i in range(0, parts):
        o_part = ((i_slot + i * step).to(tl.int64) * BN + o_slot) * D
        b_dk += load_tile(p_part_k, o_part, m_key, D, BD)
        b_dv += load_tile(p_part_v, o_part, m_key, D, BD)
    store_tile(p_dk, o_k, m_key, b_dk, D, BD)
    store_tile(p_dv, o_k, m_key, b_dv, D, BD)


@kernel
def upper_d_key_kernel(
    p_q, p_k, p_v, p_do, p_shift, p_factor, p_mean, p_tokens, p_blocks, p_parts, p_spread, p_dk, p_dv, p_part_k, p_part_v,
    scale, d_scale, i_from, blocks, above, queries, keys,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same for BN neighbouring gists above level 0, of which blocks of queries select many at once: visited by blocks.

    Of a slice of ``blocks`` blocks from i_from on, whose lists have bits for the first ``above`` rows: p_spread [lists, above].
    p_parts [parts, 6]: sample, first key row, last + 1, first block, last + 1, slot or -1. Partial sums [slots, HKV, BN, D].
    Grid: (parts, HKV).
    """
    i_head = tl.program_id(1)
    p_parts += tl.program_id(0) * 6
    i_sample, i_row, i_end = tl.load(p_parts), tl.load(p_parts + 1), tl.load(p_parts + 2)
    i_first, i_last = tl.maximum(tl.load(p_parts + 3), i_from), tl.minimum(tl.load(p_parts + 4), i_from + blocks)
    i_slot = tl.load(p_parts + 5)
    o_slot = tl.arange(0, BN)
    o_key, m_key = i_row + o_slot, i_row + o_slot < i_end
    o_k = (i_sample.to(tl.int64) * keys + o_key) * (HKV * D) + i_head * D
    b_k = load_tile(p_k, o_k, m_key, D, BD)
    b_v = load_tile(p_v, o_k, m_key, D, BD)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    for i_block in range(i_first, i_last):
        p_bits = p_spread + ((i_block - i_from) * HKV + i_head).to(tl.int64) * above
        b_bits = tl.load(p_bits + o_key, mask=m_key, other=0)
        if tl.max((b_bits != 0).to(tl.int32), 0) > 0:
            _, m_row, o_query, o_bit, o_q, o_stat = block_rows(p_blocks, p_tokens, i_block, i_head, queries, H, HKV, D, BM)
            m_seen = ((b_bits[:, None] >> o_bit[None, :]) & 1) != 0
            b_dk, b_dv = _add_rows(
                b_dk, b_dv, b_k, b_v, p_q, p_do, p_shift, p_factor, p_mean, o_q, o_stat, m_row, m_seen, scale, D, BD, EXACT,
                UPCAST,
            )  # fmt: skip
    i_slot = tl.where(i_slot >= 0, i_slot * HKV + i_head, -1)
    _write_part(p_dk, p_dv, p_part_k, p_part_v, i_slot, o_slot, o_k, m_key, b_dk * d_scale, b_dv, D, BD, BN)


@kernel
def add_upper_kernel(
    p_part_k, p_part_v, p_sums, p_dk, p_dv, keys, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):
    """Add the partial sums of a group to d_k, d_v, always in the same order.

    p_sums [n, 5]: sample, first key row, last + 1, first slot, number of slots. Grid: (n, HKV, BN / 16).
    """
    i_head = tl.program_id(1)
    p_sums += tl.program_id(0) * 5
    i_sample, i_row, i_end = tl.load(p_sums), tl.load(p_sums + 1), tl.load(p_sums + 2)
    i_slot, slots = tl.load(p_sums + 3) * HKV + i_head, tl.load(p_sums + 4)
    o_slot = tl.program_id(2) * 16 + tl.arange(0, 16)
    o_k = (i_sample.to(tl.int64) * keys + i_row + o_slot) * (HKV * D) + i_head * D
    _add_parts(p_dk, p_dv, p_part_k, p_part_v, i_slot, slots, HKV, o_slot, o_k, i_row + o_slot < i_end, D, BD, BN)


@kernel
def by_token_kernel(
    p_rows_k, p_rows_v, p_token_rows, p_copy_of, p_dk, p_dv, tokens, keys, batch,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """d_k, d_v [B, T, HKV, D] from their fp32 rows [B * R, HKV, D]: that of each token, and of its sink copy that is seen.

    p_token_rows [B, T] int64: row of a token; p_copy_of [B, T]: of its copy, or -1. ADD: to what is there.
    Grid: (tokens / BN, HKV).
    """
    i_head = tl.program_id(1)
    o_token = tl.program_id(0) * BN + tl.arange(0, BN)
    m_token = o_token < batch * tokens
    o_base = (o_token // tokens).to(tl.int64) * keys
    o_row = tl.load(p_token_rows + o_token, mask=m_token, other=0)
    o_copy = tl.load(p_copy_of + o_token, mask=m_token, other=-1)
    o_d = o_token.to(tl.int64) * (HKV * D) + i_head * D
    o_from = (o_base + o_row) * (HKV * D) + i_head * D
    o_sink = (o_base + o_copy) * (HKV * D) + i_head * D
    b_dk = load_tile(p_rows_k, o_from, m_token, D, BD) + load_tile(p_rows_k, o_sink, o_copy >= 0, D, BD)
    b_dv = load_tile(p_rows_v, o_from, m_token, D, BD) + load_tile(p_rows_v, o_sink, o_copy >= 0, D, BD)
    if ADD:
        b_dk += load_tile(p_dk, o_d, m_token, D, BD).to(tl.float32)
        b_dv += load_tile(p_dv, o_d, m_token, D, BD).to(tl.float32)
    store_tile(p_dk, o_d, m_token, b_dk, D, BD)
    store_tile(p_dv, o_d, m_token, b_dv, D, BD)
