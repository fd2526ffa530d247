"""The Triton kernels of decoding: pick what a new token unfolds, attend to it in splits, combine the splits.

Queries are single new tokens; each reads the cache of its own sequence in place. Where its rows lie stands in two tables, so that
a captured CUDA graph stays right while sequences grow and their buffers move:

- ``ints`` [N, 3 + 5 * L]: sinks, first and end of the raw window; per level (segment 0 first) first and end of the gists that the
  compressed mask shows (equal where the token recalls), gists so far, first gist whose parent is open, budget (0: no recall);
- ``places`` [N, 2 * (L + 1) + L] int64: per segment where its keys begin, in elements from ``p_anchor``, and its capacity (rows
  from one KV head to the next; values follow the last head's keys); per level where its ``ends`` begin, from ``p_ends``.

A *row code* is a row of a segment, plus the segment times 2^26. What a KV head of a query reads is a few ranges and a list of
codes, which :func:`pick_kernel` writes; its memory is scratch of fixed size.
"""

import triton
import triton.language as tl

from kernels.compressed.common import dot, load_tile, store_tile
from kernels.compressed.forward import softmax_step
from kernels.select.kernels import LEAST, MOST, any_bit, narrow, ordered

SEGMENT: tl.constexpr = tl.constexpr(1 << 26)


@triton.jit
def _row_offsets(p_places, o_row, i_segment, i_head, HKV: tl.constexpr, D: tl.constexpr):
    """Elements from the anchor to the key of rows of one segment, and from there to the value."""
    i_base = tl.load(p_places + 2 * i_segment)
    i_capacity = tl.load(p_places + 2 * i_segment + 1)
    return i_base + (i_head * i_capacity + o_row.to(tl.int64)) * D, HKV * i_capacity * D


@triton.jit
def _load_rows(p_anchor, o_x, m_x, D: tl.constexpr, BD: tl.constexpr):
    """Tile [n, BD]; every row begins at a multiple of 8 elements."""
    return load_tile(p_anchor, tl.multiple_of(o_x, 8), m_x, D, BD)


@triton.jit
def _count(p_score, b_1, b_2, b_3, n, capacity, GS: tl.constexpr, BS: tl.constexpr):
    """Per head, how many of n ordered scores reach each of three bounds."""
    o_head = tl.arange(0, GS)
    b_over_1 = tl.zeros([GS], tl.int32)
    b_over_2 = tl.zeros([GS], tl.int32)
    b_over_3 = tl.zeros([GS], tl.int32)
    for i in range(0, n, BS):
        o_place = i + tl.arange(0, BS)
        b_s = tl.load(p_score + o_head[:, None] * capacity + o_place[None, :], mask=(o_place < n)[None, :], other=LEAST)
        b_over_1 += tl.sum((b_s >= b_1[:, None]).to(tl.int32), 1)
        b_over_2 += tl.sum((b_s >= b_2[:, None]).to(tl.int32), 1)
        b_over_3 += tl.sum((b_s >= b_3[:, None]).to(tl.int32), 1)
    return b_over_1, b_over_2, b_over_3


@triton.jit
def _bound(p_score, n, budget, capacity, GS: tl.constexpr, BS: tl.constexpr):
    """Per head the bound that the budget reaches, and of those equal to it how many are taken: the search of selection."""
    o_head = tl.arange(0, GS)
    b_most = tl.full([GS], LEAST, tl.int32)
    b_least = tl.full([GS], MOST, tl.int32)
    b_count = tl.zeros([GS], tl.int32)
    for i in range(0, n, BS):
        o_place = i + tl.arange(0, BS)
        b_s = tl.load(p_score + o_head[:, None] * capacity + o_place[None, :], mask=(o_place < n)[None, :], other=LEAST)
        b_most = tl.maximum(b_most, tl.max(b_s, 1))
        b_least = tl.minimum(b_least, tl.min(tl.where(b_s > LEAST, b_s, MOST), 1))
        b_count += tl.sum((b_s > LEAST).to(tl.int32), 1)
    b_budget = tl.minimum(b_count, budget)
    b_from = b_least.to(tl.int64)
    b_to = b_most.to(tl.int64) + 1
    b_over = tl.zeros([GS], tl.int32)  # scores >= to
    b_more = (b_count > b_budget) & (b_to - b_from > 1)
    while tl.max(b_more.to(tl.int32), 0) > 0:
        b_width = tl.where(b_more, b_to - b_from, 0)
        b_1 = (b_from + b_width // 4).to(tl.int32)
        b_2 = (b_from + b_width // 2).to(tl.int32)
        b_3 = (b_from + b_width // 4 * 3 + b_width % 4 * 3 // 4).to(tl.int32)
        b_over_1, b_over_2, b_over_3 = _count(p_score, b_1, b_2, b_3, n, capacity, GS, BS)
        b_from, b_to, b_count, b_over, b_more = narrow(
            b_from, b_to, b_count, b_over, b_more, b_1, b_2, b_3, b_over_1, b_over_2, b_over_3, b_budget
        )
    b_room = tl.where(b_count > b_budget, b_budget - b_over, MOST)
    return b_from.to(tl.int32), b_room


@triton.jit
def pick_kernel(
    p_q, p_anchor, p_ends, p_ints, p_places, p_score, p_row, p_bits, p_list, p_total, sink, capacity, room,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BG: tl.constexpr, GS: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, BW: tl.constexpr, SHARED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The codes [N, HKV, room] that each KV head of a query unfolds, and their number [N, HKV]. Grid: (N, HKV).

    Scratch: scores [N, HKV, GS, capacity] int32; candidates below the top, rows and bits (of the heads that selected their
    parent) [N, HKV, 2, capacity] int32, one half read and one written per level. SHARED: one selection by the summed scores.
    """
    G: tl.constexpr = H // HKV
    i_query, i_head = tl.program_id(0), tl.program_id(1)
    i_own = i_query.to(tl.int64) * HKV + i_head
    p_ints += i_query * (3 + 5 * L)
    p_places += i_query * (3 * L + 2)
    p_score += i_own * GS * capacity
    p_row += i_own * 2 * capacity
    p_bits += i_own * 2 * capacity
    p_list += i_own * room
    o_row = tl.arange(0, BG)
    b_q = load_tile(p_q, i_query.to(tl.int64) * (H * D) + (i_head * G + o_row) * D, o_row < G, D, BD)
    o_head = tl.arange(0, GS)
    i_window = tl.load(p_ints + 1)
    listed, known = 0, 0  # codes written; candidates that have a selected parent
    for s in tl.static_range(L):
        p_level = p_ints + 3 + 5 * s
        i_tail, budget = tl.load(p_level + 3), tl.load(p_level + 4)
        n = tl.where(budget > 0, known + tl.load(p_level + 2) - i_tail, 0)
        p_old = (s % 2) * capacity
        for i in range(0, n, BN):
            o_place = i + tl.arange(0, BN)
            m_known = o_place < known
            o_key = tl.load(p_row + p_old + o_place, mask=m_known, other=0)
            b_bits = tl.load(p_bits + p_old + o_place, mask=m_known, other=-1)
            o_key = tl.where(m_known, o_key, i_tail + o_place - known)
            o_k, _ = _row_offsets(p_places, o_key, s, i_head, HKV, D)
            b_s = dot(b_q, tl.trans(_load_rows(p_anchor, o_k, o_place < n, D, BD)), UPCAST)
            if SHARED:
                b_s = tl.broadcast_to(tl.sum(tl.where((o_row < G)[:, None], b_s, 0.0), 0)[None, :], [BG, BN])
            m_seen = ((b_bits[None, :] >> tl.minimum(o_row, 31)[:, None]) & 1) != 0
            b_s = tl.where(m_seen & (o_row < G)[:, None], ordered(b_s), LEAST)
            m_score = (o_row < GS)[:, None] & (o_place < n)[None, :]
            tl.store(p_score + o_row[:, None] * capacity + o_place[None, :], b_s, mask=m_score)
        tl.debug_barrier()
        b_bound, b_room = _bound(p_score, n, budget, capacity, GS, BS)

        children = 0
        for i in range(0, n, BN):
            o_place = i + tl.arange(0, BN)
            m_place = o_place < n
            b_s = tl.load(p_score + o_head[:, None] * capacity + o_place[None, :], mask=m_place[None, :], other=LEAST)
            b_equal = ((b_s == b_bound[:, None]) & (b_s > LEAST)).to(tl.int32)
            m_first = tl.cumsum(b_equal, 1) <= b_room[:, None]  # of equal ones the earlier gists
            b_taken = ((b_s > b_bound[:, None]) | ((b_equal > 0) & m_first)).to(tl.int32)
            b_room -= tl.sum(b_equal, 1)
            b_any = tl.max(b_taken, 0)
            o_key = tl.load(p_row + p_old + o_place, mask=o_place < known, other=0)
            o_key = tl.where(o_place < known, o_key, i_tail + o_place - known)
            o_new = listed + tl.cumsum(b_any, 0) - 1
            tl.store(p_list + o_new, o_key + s * SEGMENT, mask=(b_any > 0) & (o_new < room))
            listed += tl.sum(b_any, 0)
            # The children: candidates of the next level, or raw tokens that the window does not hold.
            p_end = p_ends + tl.load(p_places + 2 * (L + 1) + s)
            o_hi = tl.load(p_end + o_key, mask=b_any > 0, other=0).to(tl.int32)
            o_lo = tl.load(p_end + o_key - 1, mask=(b_any > 0) & (o_key > 0), other=0).to(tl.int32)
            if s == L - 1:
                o_lo = tl.minimum(tl.maximum(o_lo, sink), o_hi)
                o_lo = tl.where(o_hi > i_window, o_hi, o_lo)
            b_width = o_hi - o_lo
            o_at = tl.cumsum(b_width, 0) - b_width
            b_heads = tl.reduce(b_taken << tl.minimum(o_head, 31)[:, None], 0, any_bit)
            for w in range(0, tl.max(b_width, 0), BW):
                o_child = w + tl.arange(0, BW)
                m_child = o_child[None, :] < b_width[:, None]
                if s == L - 1:
                    o_to = listed + o_at[:, None] + o_child[None, :]
                    tl.store(p_list + o_to, o_lo[:, None] + o_child[None, :] + L * SEGMENT, mask=m_child & (o_to < room))
                else:
                    o_to = children + o_at[:, None] + o_child[None, :]
                    p_new = ((s + 1) % 2) * capacity
                    b_heads_of = tl.broadcast_to(b_heads[:, None], [BN, BW])
                    tl.store(p_row + p_new + o_to, o_lo[:, None] + o_child[None, :], mask=m_child & (o_to < capacity))
                    tl.store(p_bits + p_new + o_to, b_heads_of, mask=m_child & (o_to < capacity))
            if s == L - 1:
                listed += tl.sum(b_width, 0)
            else:
                children += tl.sum(b_width, 0)
        known = children
        tl.debug_barrier()
    tl.store(p_total + i_own, listed)


@triton.jit
def attend_kernel(
    p_q, p_anchor, p_ints, p_places, p_list, p_total, p_part, p_max, p_sum, scale, room,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BG: tl.constexpr,
    BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of a KV head of a query: sums [N, H, splits, D], maxima and sums of weights [N, H, splits], fp32.

    Grid: (splits, HKV, N).
    """
    G: tl.constexpr = H // HKV
    i_split, i_head, i_query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    i_own = i_query.to(tl.int64) * HKV + i_head
    p_ints += i_query * (3 + 5 * L)
    p_places += i_query * (3 * L + 2)
    p_list += i_own * room
    o_row = tl.arange(0, BG)
    o_q = i_query.to(tl.int64) * H + i_head * G + o_row
    b_q = load_tile(p_q, o_q * D, o_row < G, D, BD)
    sinks, i_lo = tl.load(p_ints), tl.load(p_ints + 1)
    ranged = sinks + tl.load(p_ints + 2) - i_lo  # rows of ranges; then come those of the list
    total = ranged
    for s in tl.static_range(L):
        total += tl.load(p_ints + 4 + 5 * s) - tl.load(p_ints + 3 + 5 * s)
    listed = tl.minimum(tl.load(p_total + i_own), room)
    gists = total
    total += listed
    per = tl.cdiv(tl.cdiv(total, splits), BN) * BN
    b_max = tl.full([BG], -1e30, tl.float32)
    b_sum = tl.zeros([BG], tl.float32)
    b_out = tl.zeros([BG, BD], tl.float32)
    for i in range(i_split * per, tl.minimum(total, i_split * per + per), BN):
        o_place = i + tl.arange(0, BN)
        b_code = tl.load(p_list + o_place - gists, mask=(o_place >= gists) & (o_place < total), other=0)
        o_segment, o_key = b_code // SEGMENT, b_code % SEGMENT
        m_raw = o_place < ranged
        o_segment = tl.where(m_raw, L, o_segment)
        o_key = tl.where(m_raw, tl.where(o_place < sinks, o_place, i_lo + o_place - sinks), o_key)
        i_before = ranged
        for s in tl.static_range(L):
            i_first = tl.load(p_ints + 3 + 5 * s)
            i_after = i_before + tl.load(p_ints + 4 + 5 * s) - i_first
            m_range = (o_place >= i_before) & (o_place < i_after)
            o_segment = tl.where(m_range, s, o_segment)
            o_key = tl.where(m_range, i_first + o_place - i_before, o_key)
            i_before = i_after
        m_key = o_place < total
        o_k = tl.zeros([BN], tl.int64)
        o_v = tl.zeros([BN], tl.int64)
        for s in tl.static_range(L + 1):
            o_s, to_value = _row_offsets(p_places, o_key, s, i_head, HKV, D)
            o_k = tl.where(o_segment == s, o_s, o_k)
            o_v = tl.where(o_segment == s, o_s + to_value, o_v)
        b_k = _load_rows(p_anchor, o_k, m_key, D, BD)
        b_v = _load_rows(p_anchor, o_v, m_key, D, BD)
        b_out, b_max, b_sum = softmax_step(b_out, b_max, b_sum, b_q, b_k, b_v, m_key[None, :], scale, True, UPCAST)
    store_tile(p_part, (o_q * splits + i_split) * D, o_row < G, b_out, D, BD)
    tl.store(p_max + o_q * splits + i_split, b_max, mask=o_row < G)
    tl.store(p_sum + o_q * splits + i_split, b_sum, mask=o_row < G)


@triton.jit
def combine_kernel(
    p_part, p_max, p_sum, p_out, splits, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out [N, H, D]: the splits, weighted by their sums, always in the same order. Grid: (N * H,). BS >= splits."""
    i_row = tl.program_id(0).to(tl.int64)
    o_split = tl.arange(0, BS)
    m_split = o_split < splits
    b_max = tl.load(p_max + i_row * splits + o_split, mask=m_split, other=-1e30)
    b_weight = tl.where(m_split, tl.exp2(b_max - tl.max(b_max, 0)), 0.0)
    b_sum = tl.sum(b_weight * tl.load(p_sum + i_row * splits + o_split, mask=m_split, other=0.0), 0)
    b_part = load_tile(p_part, (i_row * splits + o_split) * D, m_split, D, BD)
    o_dim = tl.arange(0, BD)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / b_sum
    tl.store(p_out + i_row * D + o_dim, b_out.to(p_out.dtype.element_ty), mask=o_dim < D)
