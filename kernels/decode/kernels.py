"""The Triton kernels of decoding: score a level's candidates in splits, attend in splits, combine the splits.

Queries are single new tokens; each reads the cache of its own sequence in place. Where its rows lie stands in two tables, so that
a captured CUDA graph stays right while sequences grow and their buffers move:

- ``ints`` [N, 3 + 5 * L]: sinks, first and end of the raw window; per level (segment 0 first) first and end of the gists that the
  compressed mask shows (equal where the token recalls), gists so far, first gist whose parent is open, budget (0: no recall);
- ``places`` [N, 2 * (L + 1) + L] int64: per segment where its keys begin, in units of UNIT elements from ``p_anchor``, and its
  capacity (rows from one KV head to the next; values follow the last head's keys); per level where its ``ends`` begin, from
  ``p_ends``.

No program works alone: the kernel that scores level s, and the one that attends, begin with the search of the level above (or
the last one) in the scores that the launch before it left. Every split repeats that search, which costs no time where
the splits run side by side, and goes on with its own share of what was selected: the items whose number it is, modulo the
splits. So the selected items of a level are written by many programs, each its own ones, and read by the same program,
or by a later launch.

The candidates of a level stand side by side: W places for each selected item of the level above (those without a child stay
empty), then the gists whose parent is open. W is a bucket of the longest group.
"""

import triton
import triton.language as tl

from unfold.kernels.compressed.common import dot, kernel, load_tile, store_tile
from unfold.kernels.compressed.forward import softmax_step
from unfold.kernels.select.search import LEAST, MOST, moments, narrow, ordered, spread_of, three_bounds

# Elements. Rows begin at multiples of it, which the compiler sees only where the number is multiplied by it here: with a hint
# on a function's argument it would load two bytes at a time.
UNIT: tl.constexpr = tl.constexpr(8)


@triton.jit
def any_bit(a, b):
    return a | b


@triton.jit
def _row_offsets(p_places, o_row, i_segment, i_head, HKV: tl.constexpr, D: tl.constexpr):
    """Elements from the anchor to the key of rows of one segment, and from there to the value."""
    i_base = tl.load(p_places + 2 * i_segment) * UNIT
    i_capacity = tl.load(p_places + 2 * i_segment + 1)
    return i_base + (i_head * i_capacity + o_row.to(tl.int64)) * D, HKV * i_capacity * D


@triton.jit
def _children(p_ends, o_parent, m_parent):
    """The items [lo, hi) of the segment below that gists closed."""
    o_hi = tl.load(p_ends + o_parent, mask=m_parent, other=0).to(tl.int32)
    o_lo = tl.load(p_ends + o_parent - 1, mask=m_parent & (o_parent > 0), other=0).to(tl.int32)
    return o_lo, o_hi


@triton.jit
def _scores(p_score, i, n, capacity, GS: tl.constexpr, BS: tl.constexpr):
    """Ordered scores [GS, BS] of the places i .. i + BS, LEAST behind the n-th."""
    o_place = i + tl.arange(0, BS)
    o_score = tl.arange(0, GS)[:, None] * capacity + o_place[None, :]
    return tl.load(p_score + o_score, mask=(o_place < n)[None, :], other=LEAST)


@triton.jit
def _over(b_s, b_1, b_2, b_3):
    """Per head, how many ordered scores reach each of three bounds; two of them share one sum of 16 bits each."""
    b_two = (b_s >= b_1[:, None]).to(tl.int32) + ((b_s >= b_2[:, None]).to(tl.int32) << 16)
    b_two = tl.sum(b_two, 1)
    return b_two & 0xFFFF, b_two >> 16, tl.sum((b_s >= b_3[:, None]).to(tl.int32), 1)


@triton.jit
def _bound(p_score, n, budget, capacity, GS: tl.constexpr, BS: tl.constexpr, WHOLE: tl.constexpr):
    """Per head the bound that the budget reaches, and of those equal to it how many are taken.

    WHOLE: n is at most BS, so that the scores stay in registers.
    """
    b_s = _scores(p_score, 0, n, capacity, GS, BS)
    b_count, b_sum, b_square = moments(b_s)
    if not WHOLE:
        for i in range(BS, n, BS):
            b_more_count, b_more_sum, b_more_square = moments(_scores(p_score, i, n, capacity, GS, BS))
            b_count += b_more_count
            b_sum += b_more_sum
            b_square += b_more_square
    b_mean, b_std = spread_of(b_count, b_sum, b_square)
    b_budget = tl.minimum(b_count, budget)
    b_from = tl.full([GS], LEAST + 1, tl.int64)
    b_to = tl.full([GS], MOST + 1, tl.int64)
    b_over = tl.zeros([GS], tl.int32)
    b_more = b_count > b_budget
    m_quarter = b_count < 0  # nowhere yet
    b_1, b_2, b_3 = three_bounds(b_from, b_to, b_count, b_over, b_budget, b_more, b_mean, b_std, True, m_quarter)
    while tl.max(b_more.to(tl.int32), 0) > 0:
        b_over_1, b_over_2, b_over_3 = _over(b_s, b_1, b_2, b_3)
        if not WHOLE:
            for i in range(BS, n, BS):
                b_more_1, b_more_2, b_more_3 = _over(_scores(p_score, i, n, capacity, GS, BS), b_1, b_2, b_3)
                b_over_1 += b_more_1
                b_over_2 += b_more_2
                b_over_3 += b_more_3
        b_left = b_count - b_over
        b_from, b_to, b_count, b_over, b_more = narrow(
            b_from, b_to, b_count, b_over, b_more, b_1, b_2, b_3, b_over_1, b_over_2, b_over_3, b_budget
        )
        m_quarter = (m_quarter == 0) & (2 * (b_count - b_over) > b_left)
        b_1, b_2, b_3 = three_bounds(b_from, b_to, b_count, b_over, b_budget, b_more, b_mean, b_std, False, m_quarter)
    b_room = tl.where(b_count > b_budget, b_budget - b_over, MOST)
    return b_from.to(tl.int32), b_room


@triton.jit
def _select(
    p_score, p_row, p_item, p_bits, n, budget, i_split, splits, capacity, room,
    GS: tl.constexpr, BS: tl.constexpr, WHOLE: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Search a level's scores, write the items of this split: rows, and bits of the heads that took them.

    Returns their number, of all splits together.
    """
    o_head = tl.minimum(tl.arange(0, GS), 31)
    b_bound, b_room = _bound(p_score, n, budget, capacity, GS, BS, WHOLE)
    items = 0
    for i in range(0, n, BS):
        o_place = i + tl.arange(0, BS)
        b_s = _scores(p_score, i, n, capacity, GS, BS)
        b_equal = ((b_s == b_bound[:, None]) & (b_s > LEAST)).to(tl.int32)
        m_first = tl.cumsum(b_equal, 1) <= b_room[:, None]  # of equal ones the earlier gists
        b_taken = ((b_s > b_bound[:, None]) | ((b_equal > 0) & m_first)).to(tl.int32)
        b_room -= tl.sum(b_equal, 1)
        b_any = tl.max(b_taken, 0)
        o_item = items + tl.cumsum(b_any, 0) - 1
        m_own = (b_any > 0) & (o_item % splits == i_split) & (o_item < room)
        o_key = o_place if TOP else tl.load(p_row + o_place, mask=m_own, other=0)
        tl.store(p_item + o_item, o_key, mask=m_own)
        tl.store(p_bits + o_item, tl.reduce(b_taken << o_head[:, None], 0, any_bit), mask=m_own)
        items += tl.sum(b_any, 0)
    tl.debug_barrier()  # the program reads what it wrote
    return tl.minimum(items, room)


@kernel
def score_kernel(
    p_q, p_anchor, p_ends, p_ints, p_places, p_above_score, p_above_row, p_score, p_row, p_item, p_bits, p_taken, p_count,
    above, capacity, room,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BG: tl.constexpr, GS: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, WHOLE: tl.constexpr, W: tl.constexpr, LEVEL: tl.constexpr, SHARED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Ordered scores [N, HKV, GS, capacity] and rows [N, HKV, capacity] of the candidates of segment LEVEL, and their number.

    Below the top first the selection of the segment above from its scores [N, HKV, GS, above] and rows: the items and the bits
    of heads [N, HKV, L, room], their number in p_taken. p_taken, p_count (of candidates): [N, HKV, L]. SHARED: one selection
    by the summed scores.
    Grid: (splits, HKV, N).
    """
    G: tl.constexpr = H // HKV
    i_split, i_head, i_query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    i_own = i_query.to(tl.int64) * HKV + i_head
    p_ints += i_query * (3 + 5 * L) + 3
    p_places += i_query * (3 * L + 2)
    p_score += i_own * GS * capacity
    p_row += i_own * capacity
    i_tail, budget = tl.load(p_ints + 5 * LEVEL + 3), tl.load(p_ints + 5 * LEVEL + 4)
    tail = tl.load(p_ints + 5 * LEVEL + 2) - i_tail
    o_row = tl.arange(0, BG)
    b_q = load_tile(p_q, i_query.to(tl.int64) * (H * D) + (i_head * G + o_row) * D, o_row < G, D, BD)
    items = 0
    if LEVEL > 0:
        p_item += (i_own * L + LEVEL - 1) * room
        p_bits += (i_own * L + LEVEL - 1) * room
        n_above, budget_above = tl.load(p_count + i_own * L + LEVEL - 1), tl.load(p_ints + 5 * LEVEL - 1)
        items = _select(
            p_above_score + i_own * GS * above, p_above_row + i_own * above, p_item, p_bits, n_above, budget_above,
            i_split, splits, above, room, GS, BS, WHOLE, LEVEL == 1,
        )  # fmt: skip
        if i_split == 0:
            tl.store(p_taken + i_own * L + LEVEL - 1, items)
    items = tl.where(budget > 0, items, 0)
    tail = tl.where(budget > 0, tail, 0)
    if i_split == 0:
        tl.store(p_count + i_own * L + LEVEL, items * W + tail)

    own = tl.maximum(tl.cdiv(items - i_split, splits), 0) * W  # places behind this split's items
    per = tl.cdiv(tail, splits)
    own_tail = tl.maximum(tl.minimum(tail - i_split * per, per), 0)
    for i in range(0, own + own_tail, BN):
        o_place = i + tl.arange(0, BN)
        m_place = o_place < own + own_tail
        o_open = i_split * per + o_place - own
        m_key, o_key, o_to = m_place, i_tail + o_open, items * W + o_open
        b_bits = tl.full([BN], -1, tl.int32)
        if LEVEL > 0:
            m_child = o_place < own
            o_item = i_split + o_place // W * splits
            o_parent = tl.load(p_item + o_item, mask=m_child, other=0)
            b_bits = tl.load(p_bits + o_item, mask=m_child, other=-1)
            o_lo, o_hi = _children(p_ends + tl.load(p_places + 2 * (L + 1) + LEVEL - 1), o_parent, m_child)
            o_key = tl.where(m_child, o_lo + o_place % W, o_key)
            m_key = m_place & ((o_key < o_hi) | (o_place >= own))
            o_to = tl.where(m_child, o_item * W + o_place % W, o_to)
        o_k, _ = _row_offsets(p_places, o_key, LEVEL, i_head, HKV, D)
        b_s = dot(b_q, tl.trans(load_tile(p_anchor, o_k, m_key, D, BD)), UPCAST)
        if SHARED:
            b_s = tl.broadcast_to(tl.sum(tl.where((o_row < G)[:, None], b_s, 0.0), 0)[None, :], [BG, BN])
        m_seen = m_key[None, :] & (((b_bits[None, :] >> tl.minimum(o_row, 31)[:, None]) & 1) != 0)
        b_s = tl.where(m_seen & (o_row < G)[:, None], ordered(b_s), LEAST)
        m_to = m_place & (o_to < capacity)
        tl.store(p_score + o_row[:, None] * capacity + o_to[None, :], b_s, mask=(o_row < GS)[:, None] & m_to[None, :])
        if LEVEL > 0:
            tl.store(p_row + o_to, o_key, mask=m_to)


@triton.jit
def _flat_rows(p_ints, p_item, p_taken, o_place, m_place, room, L: tl.constexpr, RECALLS: tl.constexpr):
    """Segment and row at places of the window, the sinks, the ranges of the compressed mask, the gists selected above level 0."""
    sinks, i_lo = tl.load(p_ints), tl.load(p_ints + 1)
    i_before = sinks + tl.load(p_ints + 2) - i_lo
    o_key = tl.where(o_place < sinks, o_place, i_lo + o_place - sinks)
    o_segment = tl.full([o_place.shape[0]], L, tl.int32)
    for s in tl.static_range(L):
        i_first = tl.load(p_ints + 3 + 5 * s)
        m_behind = o_place >= i_before
        o_segment = tl.where(m_behind, s, o_segment)
        o_key = tl.where(m_behind, i_first + o_place - i_before, o_key)
        i_before += tl.load(p_ints + 4 + 5 * s) - i_first
    if RECALLS:
        for s in tl.static_range(L - 1):
            m_behind = o_place >= i_before
            i_after = i_before + tl.load(p_taken + s)
            m_listed = m_behind & (o_place < i_after) & m_place
            o_listed = tl.load(p_item + s * room + o_place - i_before, mask=m_listed, other=0)
            o_segment = tl.where(m_behind, s, o_segment)
            o_key = tl.where(m_behind, o_listed, o_key)
            i_before = i_after
    return o_segment, o_key


@triton.jit
def _flat_total(p_ints, p_taken, L: tl.constexpr, RECALLS: tl.constexpr):
    """How many places :func:`_flat_rows` has."""
    total = tl.load(p_ints) + tl.load(p_ints + 2) - tl.load(p_ints + 1)
    for s in tl.static_range(L):
        total += tl.load(p_ints + 4 + 5 * s) - tl.load(p_ints + 3 + 5 * s)
    if RECALLS:
        for s in tl.static_range(L - 1):
            total += tl.load(p_taken + s)
    return total


@kernel
def attend_kernel(
    p_q, p_anchor, p_ends, p_ints, p_places, p_score, p_row, p_item, p_bits, p_taken, p_count, p_part, p_max, p_sum,
    scale, sink, capacity, room,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BG: tl.constexpr, GS: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, WHOLE: tl.constexpr, W: tl.constexpr, RECALLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of a KV head of a query: sums [N, H, splits, D], maxima and sums of weights [N, H, splits], fp32.

    First the selection of level 0 from its scores [N, HKV, GS, capacity]; each of its gists has W + 1 places, itself and the
    raw tokens behind it, but for those that the window or the sinks hold. Grid: (splits, HKV, N).
    """
    G: tl.constexpr = H // HKV
    i_split, i_head, i_query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    i_own = i_query.to(tl.int64) * HKV + i_head
    p_ints += i_query * (3 + 5 * L)
    p_places += i_query * (3 * L + 2)
    p_taken += i_own * L
    p_item += i_own * L * room
    o_row = tl.arange(0, BG)
    o_q = i_query.to(tl.int64) * H + i_head * G + o_row
    b_q = load_tile(p_q, o_q * D, o_row < G, D, BD)
    own = 0
    if RECALLS:
        p_last = p_item + (L - 1) * room
        n, budget = tl.load(p_count + i_own * L + L - 1), tl.load(p_ints + 5 * L + 2)
        items = _select(
            p_score + i_own * GS * capacity, p_row + i_own * capacity, p_last, p_bits + (i_own * L + L - 1) * room,
            n, budget, i_split, splits, capacity, room, GS, BS, WHOLE, L == 1,
        )  # fmt: skip
        own = tl.maximum(tl.cdiv(items - i_split, splits), 0) * (W + 1)
    total = _flat_total(p_ints, p_taken, L, RECALLS)
    per = tl.cdiv(total, splits)
    flat = tl.maximum(tl.minimum(total - i_split * per, per), 0)
    i_window = tl.load(p_ints + 1)
    b_max = tl.full([BG], -1e30, tl.float32)
    b_sum = tl.zeros([BG], tl.float32)
    b_out = tl.zeros([BG, BD], tl.float32)
    for i in range(0, flat + own, BN):
        o_place = i + tl.arange(0, BN)
        m_key = o_place < flat + own
        o_segment, o_key = _flat_rows(p_ints, p_item, p_taken, i_split * per + o_place, o_place < flat, room, L, RECALLS)
        if RECALLS:
            o_within = (o_place - flat) % (W + 1)
            m_own = (o_place >= flat) & m_key
            o_gist = tl.load(p_last + i_split + (o_place - flat) // (W + 1) * splits, mask=m_own, other=0)
            o_lo, o_hi = _children(p_ends + tl.load(p_places + 3 * L + 1), o_gist, m_own)
            # The window holds a chunk entirely or not at all.
            o_raw = tl.maximum(o_lo, sink) + o_within - 1
            m_raw = (o_within > 0) & (o_raw < o_hi) & (o_hi <= i_window)
            o_segment = tl.where(m_own, tl.where(o_within == 0, L - 1, L), o_segment)
            o_key = tl.where(m_own, tl.where(o_within == 0, o_gist, o_raw), o_key)
            m_key = m_key & ((o_place < flat) | (o_within == 0) | m_raw)
        o_k = tl.zeros([BN], tl.int64)
        o_v = tl.zeros([BN], tl.int64)
        for s in tl.static_range(L + 1):
            o_s, to_value = _row_offsets(p_places, o_key, s, i_head, HKV, D)
            o_k = tl.where(o_segment == s, o_s, o_k)
            o_v = tl.where(o_segment == s, o_s + to_value, o_v)
        b_k = load_tile(p_anchor, o_k, m_key, D, BD)
        b_v = load_tile(p_anchor, o_v, m_key, D, BD)
        b_out, b_max, b_sum = softmax_step(b_out, b_max, b_sum, b_q, b_k, b_v, m_key[None, :], scale, True, UPCAST)
    store_tile(p_part, (o_q * splits + i_split) * D, o_row < G, b_out, D, BD)
    tl.store(p_max + o_q * splits + i_split, b_max, mask=o_row < G)
    tl.store(p_sum + o_q * splits + i_split, b_sum, mask=o_row < G)


@kernel
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
