"""The Triton kernels of the routing loss.

Columns of a tile are the *rows* of a block of queries: (query, query head) pairs of one KV head, BM of them. Scores are [keys,
BM], in units of log2. A slice of the blocks (``items`` of them from ``i_from``) goes through all launches before the next one:

- :func:`raw_sum_kernel` sums the exponentials of every row's scores of raw tokens;
- :func:`mass_kernel` and, level by level, :func:`upper_kernel` write the masses of gists into a scratch;
- :func:`student_kernel` goes over the gists' scores, for their sums and the loss;
- :func:`d_gist_kernel` adds up the gradients of the gists.

The scratch is [HKV, items, groups, BM], ``groups`` being the gists of the sample that has most. Numbers per row are
[.., HKV, items, BM]. Of a block all gists between the first and the last that any of its queries has are written, with zeros
where a query does not have one. Everything is summed in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from unfold.kernels.common.tl import dot, in_range, kernel, load_tile, store_tile

HEAD: tl.constexpr = tl.constexpr(5)  # columns of a block before its two per segment: kernels/route/plan.py


@triton.jit
def routed_rows(
    p_q, p_blocks, i_block, i_head, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    L: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Of a block: its place in the table, its sample; per row [BM]: exists, query; and the tile [BM, BD] of queries."""
    p_block = p_blocks + i_block * (HEAD + 2 * L)
    i_first, i_last = tl.load(p_block), tl.load(p_block + 1)
    o_row = tl.arange(0, BM)
    m_row = o_row < (i_last - i_first) * (H // HKV)
    o_query = i_first + o_row // (H // HKV)
    o_q = o_query.to(tl.int64) * (H * D) + (i_head * (H // HKV) + o_row % (H // HKV)) * D
    return p_block, tl.load(p_block + 2), m_row, o_query, load_tile(p_q, o_q, m_row, D, BD)


@triton.jit
def row_range(p_lo, p_hi, i_at, o_query, m_row):
    """Each row's range in tables whose numbers for the queries begin at i_at; empty for rows that do not exist."""
    return tl.load(p_lo + i_at + o_query, mask=m_row, other=0), tl.load(p_hi + i_at + o_query, mask=m_row, other=0)


@triton.jit
def sum_step(b_s, b_max, b_sum):
    """Add a tile of scores [keys, BM], -inf where hidden, to the running maximum and sum of exponentials."""
    b_new = tl.maximum(b_max, tl.max(b_s, 0))
    return b_new, b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[None, :]), 0)


@triton.jit
def shift_and_sum(b_max, b_sum):
    """The maximum and the sum relative to it, which is 1 at least; where nothing was summed 0 and 1 stand for them."""
    return tl.where(b_sum > 0, b_max, 0.0), tl.maximum(b_sum, 1.0)


@kernel
def raw_sum_kernel(
    p_q, p_k, p_first, p_hi, p_blocks, p_shift, p_factor, scale, queries, keys, i_from,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of every row's scores of its document's raw tokens up to itself the largest, and 1 / the sum of exponentials.

    p_shift, p_factor: [HKV, items, BM] fp32, the sum relative to the largest. Kept apart: their joint log-sum-exp would cost
    half the digits of an fp32 gradient.
    p_q: [M, H, D]; p_k: [B, keys, HKV, D], level-sorted. Grid: (items, HKV).
    """
    i_local, i_head = tl.program_id(0), tl.program_id(1)
    p_block, i_sample, m_row, o_query, b_q = routed_rows(p_q, p_blocks, i_from + i_local, i_head, H, HKV, D, BD, L, BM)
    b_lo = tl.load(p_first + o_query, mask=m_row, other=0)
    b_hi = tl.load(p_hi + L * queries + o_query, mask=m_row, other=0)
    stride: tl.constexpr = HKV * D
    p_k += i_sample.to(tl.int64) * keys * stride + i_head * D
    # Finite from the start: a row that has seen nothing yet must not compute inf - inf.
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    i_end = tl.load(p_block + 4)
    for i in range(tl.load(p_block + 3), i_end, BN):
        o_key = i + tl.arange(0, BN)
        b_k = load_tile(p_k, o_key.to(tl.int64) * stride, o_key < i_end, D, BD)
        b_s = dot(b_k, tl.trans(b_q), UPCAST) * scale
        m_seen = in_range(o_key[:, None], b_lo[None, :], b_hi[None, :])
        b_max, b_sum = sum_step(tl.where(m_seen, b_s, float("-inf")), b_max, b_sum)
    o_stat = (i_head * tl.num_programs(0) + i_local) * BM + tl.arange(0, BM)
    b_shift, b_sum = shift_and_sum(b_max, b_sum)
    tl.store(p_shift + o_stat, b_shift)
    tl.store(p_factor + o_stat, 1.0 / b_sum)


@triton.jit
def _sum_chunks(b_in, b_p, EXACT: tl.constexpr, UPCAST: tl.constexpr):
    """b_in [chunks, keys], 0 or 1, times b_p [keys, BM] fp32; in 16 bits as two terms, which lose no digit that counts."""
    if EXACT:
        return dot(b_in.to(tl.float32), b_p, UPCAST)
    else:
        b_in = b_in.to(tl.float32).to(tl.bfloat16)  # the interpreter would take a bool for the bits
        b_high = b_p.to(tl.bfloat16)
        b_low = (b_p - b_high.to(tl.float32)).to(tl.bfloat16)
        return dot(b_in, b_high, UPCAST) + dot(b_in, b_low, UPCAST)


@kernel
def mass_kernel(
    p_q, p_k, p_first, p_lo, p_hi, p_child_lo, p_child_hi, p_blocks, p_shift, p_factor, p_mass, scale,
    queries, tokens, keys, groups, i_from,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, FAR: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The masses of BC level-0 gists that a block has, into the scratch p_mass.

    p_shift, p_factor: of :func:`raw_sum_kernel`; p_child_lo, p_child_hi: [B, tokens].
    FAR: chunks in a row's raw window have none.
    Grid: (most such tiles of a block, items, HKV).
    """
    i_local, i_head = tl.program_id(1), tl.program_id(2)
    p_block = p_blocks + (i_from + i_local) * (HEAD + 2 * L)
    i_gist = tl.load(p_block + HEAD + 2 * L - 2) + tl.program_id(0) * BC
    i_end = tl.load(p_block + HEAD + 2 * L - 1)
    if i_gist < i_end:
        _, i_sample, m_row, o_query, b_q = routed_rows(p_q, p_blocks, i_from + i_local, i_head, H, HKV, D, BD, L, BM)
        o_row = tl.arange(0, BM)
        o_stat = (i_head * tl.num_programs(1) + i_local) * BM + o_row
        b_shift = tl.load(p_shift + o_stat)
        b_first = tl.load(p_first + o_query, mask=m_row, other=0)
        b_last = tl.load(p_hi + L * queries + o_query, mask=m_row, other=0)
        o_gist = i_gist + tl.arange(0, BC)
        m_gist = o_gist < i_end
        o_child = i_sample.to(tl.int64) * tokens + o_gist
        b_from = tl.load(p_child_lo + o_child, mask=m_gist, other=0)
        b_to = tl.load(p_child_hi + o_child, mask=m_gist, other=0)
        i_last = tl.max(b_to, 0)
        stride: tl.constexpr = HKV * D
        p_k += i_sample.to(tl.int64) * keys * stride + i_head * D
        b_mass = tl.zeros([BC, BM], tl.float32)
        for i in range(tl.load(p_child_lo + i_sample.to(tl.int64) * tokens + i_gist), i_last, BN):
            o_key = i + tl.arange(0, BN)
            b_k = load_tile(p_k, o_key.to(tl.int64) * stride, o_key < i_last, D, BD)
            b_p = tl.exp2(dot(b_k, tl.trans(b_q), UPCAST) * scale - b_shift[None, :])
            b_p = tl.where(in_range(o_key[:, None], b_first[None, :], b_last[None, :]), b_p, 0.0)
            b_in = in_range(o_key[None, :], b_from[:, None], b_to[:, None])
            b_mass += _sum_chunks(b_in, b_p, EXACT, UPCAST)
        b_mass *= tl.load(p_factor + o_stat)[None, :]
        b_lo, b_hi = row_range(p_lo, p_hi, (L - 1) * queries, o_query, m_row)
        m_has = in_range(o_gist[:, None], b_lo[None, :], b_hi[None, :])
        if FAR:
            b_window = tl.load(p_lo + L * queries + o_query, mask=m_row, other=0)
            m_has = m_has & (b_to[:, None] <= b_window[None, :])
        o_mass = (i_head * tl.num_programs(1) + i_local).to(tl.int64) * groups * BM + o_gist[:, None] * BM + o_row[None, :]
        tl.store(p_mass + o_mass, tl.where(m_has, b_mass, 0.0), mask=m_gist[:, None])


@kernel
def upper_kernel(
    p_lo, p_hi, p_child_lo, p_child_hi, p_blocks, p_mass, queries, tokens, groups, i_from,
    H: tl.constexpr, HKV: tl.constexpr, L: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The masses of BC gists of segment S that a block has: the sums of their children's. Grid: as for :func:`mass_kernel`."""
    i_local, i_head = tl.program_id(1), tl.program_id(2)
    p_block = p_blocks + (i_from + i_local) * (HEAD + 2 * L)
    i_gist, i_end = tl.load(p_block + HEAD + 2 * S) + tl.program_id(0) * BC, tl.load(p_block + HEAD + 2 * S + 1)
    if i_gist < i_end:
        i_first, i_last = tl.load(p_block), tl.load(p_block + 1)
        o_row = tl.arange(0, BM)
        m_row = o_row < (i_last - i_first) * (H // HKV)
        b_lo, b_hi = row_range(p_lo, p_hi, S * queries, i_first + o_row // (H // HKV), m_row)
        o_gist = i_gist + tl.arange(0, BC)
        m_gist = o_gist < i_end
        o_child = tl.load(p_block + 2).to(tl.int64) * tokens + o_gist
        b_from = tl.load(p_child_lo + o_child, mask=m_gist, other=0)
        b_count = tl.load(p_child_hi + o_child, mask=m_gist, other=0) - b_from
        m_has = in_range(o_gist[:, None], b_lo[None, :], b_hi[None, :])
        p_mass += (i_head * tl.num_programs(1) + i_local).to(tl.int64) * groups * BM
        b_mass = tl.zeros([BC, BM], tl.float32)
        for j in range(0, tl.max(b_count, 0)):
            # The children of a gist that a row has are among those that its block has.
            m_child = m_has & (j < b_count)[:, None]
            b_mass += tl.load(p_mass + (b_from + j)[:, None] * BM + o_row[None, :], mask=m_child, other=0.0)
        tl.store(p_mass + o_gist[:, None] * BM + o_row[None, :], b_mass, mask=m_gist[:, None])


@kernel
def student_kernel(
    p_q, p_k, p_lo, p_hi, p_blocks, p_mass, p_shift, p_factor, p_loss, scale, queries, keys, groups, i_from,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per row and segment, p_shift and p_factor [L, HKV, items, BM]: with them d score = exp2(score - shift) * factor - mass.

    The shift is the largest score, the factor the sum of masses / the sum of exponentials relative to the largest.
    And p_loss [HKV, items, BM], each row's loss over all levels in units of log2. Grid: (items, HKV).
    """
    i_local, i_head, items = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    p_block, i_sample, m_row, o_query, b_q = routed_rows(p_q, p_blocks, i_from + i_local, i_head, H, HKV, D, BD, L, BM)
    stride: tl.constexpr = HKV * D
    p_k += i_sample.to(tl.int64) * keys * stride + i_head * D
    o_row = tl.arange(0, BM)
    o_stat = (i_head * items + i_local) * BM + o_row
    p_mass += (i_head * items + i_local).to(tl.int64) * groups * BM
    b_loss = tl.zeros([BM], tl.float32)
    for s in tl.static_range(L):
        b_lo, b_hi = row_range(p_lo, p_hi, s * queries, o_query, m_row)
        b_max = tl.full([BM], -1e30, tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_whole = tl.zeros([BM], tl.float32)
        b_mean = tl.zeros([BM], tl.float32)
        i_end = tl.load(p_block + HEAD + 2 * s + 1)
        for i in range(tl.load(p_block + HEAD + 2 * s), i_end, BN):
            o_key = i + tl.arange(0, BN)
            b_k = load_tile(p_k, o_key.to(tl.int64) * stride, o_key < i_end, D, BD)
            b_s = dot(b_k, tl.trans(b_q), UPCAST) * scale
            m_seen = in_range(o_key[:, None], b_lo[None, :], b_hi[None, :])
            b_m = tl.load(p_mass + o_key[:, None] * BM + o_row[None, :], mask=m_seen, other=0.0)
            b_whole += tl.sum(b_m, 0)
            b_mean += tl.sum(tl.where(m_seen, b_m * b_s, 0.0), 0)
            b_max, b_sum = sum_step(tl.where(m_seen, b_s, float("-inf")), b_max, b_sum)
        b_shift, b_sum = shift_and_sum(b_max, b_sum)
        b_loss += b_whole * (b_shift + tl.log2(b_sum)) - b_mean
        o_level = s * tl.num_programs(1) * items * BM
        tl.store(p_shift + o_level + o_stat, b_shift)
        tl.store(p_factor + o_level + o_stat, b_whole / b_sum)
    tl.store(p_loss + o_stat, b_loss)


@kernel
def d_gist_kernel(
    p_q, p_k, p_lo, p_hi, p_blocks, p_items, p_mass, p_shift, p_factor, p_d, scale, d_scale, queries, keys, groups, i_from, items,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add to p_d [B, groups, HKV, D] fp32 what the slice's blocks give a tile of BN gists. Grid: (tiles, HKV)."""
    i_head = tl.program_id(1)
    p_items += tl.program_id(0) * 6
    i_sample, i_first, i_last, i_segment = tl.load(p_items), tl.load(p_items + 1), tl.load(p_items + 2), tl.load(p_items + 3)
    o_row = tl.arange(0, BM)
    o_key = i_first + tl.arange(0, BN)
    m_key = o_key < i_last
    o_k = i_sample.to(tl.int64) * keys * (HKV * D) + o_key * (HKV * D) + i_head * D
    b_k = load_tile(p_k, o_k, m_key, D, BD)
    b_d = tl.zeros([BN, BD], tl.float32)
    i_begin = tl.maximum(tl.load(p_items + 4) - i_from, 0)
    i_end = tl.minimum(tl.load(p_items + 5) - i_from, items)
    for i in range(i_begin, i_end):
        _, _, m_row, o_query, b_q = routed_rows(p_q, p_blocks, i_from + i, i_head, H, HKV, D, BD, L, BM)
        b_lo, b_hi = row_range(p_lo, p_hi, i_segment * queries, o_query, m_row)
        o_stat = ((i_segment * HKV + i_head) * items + i) * BM + o_row
        b_shift, b_factor = tl.load(p_shift + o_stat), tl.load(p_factor + o_stat)
        m_seen = in_range(o_key[:, None], b_lo[None, :], b_hi[None, :]) & m_key[:, None]
        o_mass = (i_head * items + i).to(tl.int64) * groups * BM + o_key[:, None] * BM + o_row[None, :]
        b_m = tl.load(p_mass + o_mass, mask=m_seen, other=0.0)
        b_p = tl.exp2(dot(b_k, tl.trans(b_q), UPCAST) * scale - b_shift[None, :])
        b_ds = tl.where(m_seen, b_p * b_factor[None, :] - b_m, 0.0)
        b_d += dot(b_ds.to(b_q.dtype), b_q, UPCAST)
    o_d = (i_sample * groups + o_key).to(tl.int64) * (HKV * D) + i_head * D
    store_tile(p_d, o_d, m_key, load_tile(p_d, o_d, m_key, D, BD) + b_d * d_scale, D, BD)
