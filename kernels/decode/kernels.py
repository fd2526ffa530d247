"""The Triton kernels of decoding that select: score a level's candidates in splits, search the scores, list what is taken.

Queries are single new tokens; each reads the cache of its own sequence in place. Where its rows lie stands in two tables, so that
a captured CUDA graph stays right while sequences grow and their buffers move:

- ``ints`` [N, 3 + 5 * L]: sinks, first and end of the raw window; per level (segment 0 first) first and end of the gists that the
  compressed mask shows (equal where the token recalls), gists so far, first gist whose parent is open, budget (0: no recall);
- ``places`` [N, 2 * (L + 1) + L] int64: per segment where its keys begin, in units of UNIT elements from ``p_anchor``, and its
  capacity (rows from one KV head to the next; values follow the last head's keys); per level where its ``ends`` begin, from
  ``p_ends``.

A step is a chain of launches, each over in a few microseconds; what counts is how many loads wait for one another. Every head
(HS = 1: the heads of a group together) searches scores of its own, one program each: a head's candidates below the top are
``budget`` parents of W places (those without a child stay empty), then the gists whose parent is open, so that all counts stand
in ``ints``, and nothing is known later than when a launch begins. A search leaves, per level, HS lists of ``budget`` entries side
by side (-1: none): the gist, and the items [lo, hi) behind it, so that whoever reads children needs one load before the key.
Entries are in no order. That heads took the same gist only the launch that attends minds (attend.py), and beside scoring the
level below, where there is time, those of the levels above are compared (p_new).

Scores are ordered integers below MOST, LEAST where there is no candidate. PDL: a launch begins before the one before it ends,
and waits before it touches what that one wrote; every program waits, so that whoever waits for it has waited for all before.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unfold.kernels.common.search import LEAST, MOST, find_bound, load_scores, normal_quantile, ordered
from unfold.kernels.common.tl import dot, kernel, load_tile

# Elements. Rows begin at multiples of it, which the compiler sees only where the number is multiplied by it here: with a hint
# on a function's argument it would load two bytes at a time.
UNIT: tl.constexpr = tl.constexpr(8)
MARKED: tl.constexpr = tl.constexpr(16)  # entries that a program compares with other heads'
FILL: tl.constexpr = tl.constexpr(32)  # entries that are marked as none at once


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def key_begin(p_places, i_segment, i_head, HKV: tl.constexpr, D: tl.constexpr):
    """Elements from the anchor to the first key of a KV head of one segment, and from a key to its value."""
    i_base = tl.load(p_places + 2 * i_segment) * UNIT
    i_capacity = tl.load(p_places + 2 * i_segment + 1)
    return i_base + i_head * i_capacity * D, HKV * i_capacity * D


@triton.jit
def _children(p_ends, o_parent, m_parent):
    """The items [lo, hi) of the segment below that gists closed; none outside the mask."""
    o_hi = tl.load(p_ends + o_parent, mask=m_parent, other=0).to(tl.int32)
    o_lo = tl.load(p_ends + o_parent - 1, mask=m_parent & (o_parent > 0), other=0).to(tl.int32)
    return o_lo, o_hi


@triton.jit
def _level(p_ints, LEVEL: tl.constexpr, W: tl.constexpr):
    """Budget of a level, places behind parents, all places, the first whose parent is open. p_ints: behind its first three."""
    budget, i_tail = tl.load(p_ints + 5 * LEVEL + 4), tl.load(p_ints + 5 * LEVEL + 3)
    behind = 0
    if LEVEL > 0:
        behind = tl.load(p_ints + 5 * LEVEL - 1) * W
    n = behind + tl.load(p_ints + 5 * LEVEL + 2) - i_tail
    return budget, behind, tl.where(budget > 0, n, 0), i_tail


@triton.jit
def _candidates(p_lo, p_hi, o_place, behind, n, i_tail, W: tl.constexpr, LEVEL: tl.constexpr):
    """The gists at places of a level, and whether there are any."""
    if LEVEL > 0:
        m_child = o_place < tl.minimum(behind, n)
        o_key = tl.load(p_lo + o_place // W, mask=m_child, other=0) + o_place % W
        o_end = tl.load(p_hi + o_place // W, mask=m_child, other=0)
        m_key = tl.where(m_child, o_key < o_end, (o_place >= behind) & (o_place < n))
        return tl.where(m_child, o_key, i_tail + o_place - behind), m_key
    else:
        return o_place, o_place < n


@kernel
def score_top_kernel(
    p_q, p_anchor, p_ints, p_places, p_score, capacity,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BG: tl.constexpr, HS: tl.constexpr,
    BN: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores [N, HKV, HS, capacity] of all gists of the top level. Grid: (splits, HKV, N)."""
    G: tl.constexpr = H // HKV
    i_split, i_head, i_query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    let_next_begin(PDL)
    wait_for_last(PDL)
    _, _, n, _ = _level(p_ints + i_query * (3 + 5 * L) + 3, 0, 1)
    i_first, _ = key_begin(p_places + i_query * (3 * L + 2), 0, i_head, HKV, D)
    p_score += (i_query.to(tl.int64) * HKV + i_head) * HS * capacity
    o_row = tl.arange(0, BG)
    b_q = load_tile(p_q, i_query.to(tl.int64) * (H * D) + (i_head * G + o_row) * D, o_row < G, D, BD)
    for i in range(i_split * BN, n, splits * BN):
        o_place = i + tl.arange(0, BN)
        m_place = o_place < n
        b_k = load_tile(p_anchor, i_first + o_place.to(tl.int64) * D, m_place, D, BD)
        b_s = dot(b_q, tl.trans(b_k), UPCAST)  # [BG, BN]; rows behind the G-th are zero
        if HS == 1:
            b_s = tl.minimum(ordered(tl.sum(b_s, 0)), MOST - 1)
            tl.store(p_score + o_place, b_s, mask=m_place)
        else:
            b_s = tl.minimum(ordered(b_s), MOST - 1)
            tl.store(p_score + o_row[:, None] * capacity + o_place[None, :], b_s, mask=(o_row < HS)[:, None] & m_place[None, :])


@triton.jit
def taken_before(p_item, o_entry, b_gist, budget, BO: tl.constexpr):
    """1 where a head before the entry's has the same gist in its list. p_item: the heads' lists of ``budget`` side by side."""
    o_first = o_entry - o_entry % tl.maximum(budget, 1)  # entries of the heads before
    last = tl.max(o_first, 0)
    b_before = o_entry * 0
    for i in range(0, last, BO):
        o_other = i + tl.arange(0, BO)
        b_other = tl.load(p_item + o_other, mask=o_other < last, other=-2)
        m_same = (b_other[None, :] == b_gist[:, None]) & (o_other[None, :] < o_first[:, None])
        b_before = tl.maximum(b_before, tl.max(m_same.to(tl.int32), 1))
    return b_before


@kernel
def score_below_kernel(
    p_q, p_anchor, p_ints, p_places, p_item, p_lo, p_hi, p_new, p_score, capacity, room, lists,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, GS: tl.constexpr, HS: tl.constexpr,
    BN: tl.constexpr, BO: tl.constexpr, W: tl.constexpr, LEVEL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores [N, HKV, HS, capacity] of each head's own candidates of segment LEVEL. p_item, p_lo, p_hi: [N, HKV, L, HS * room].

    The last ``lists`` programs of a row of the grid go beside that through the head's list of the segment above: p_new
    [N, HKV, L, HS * room], its gists, -1 where a head before took the same. Grid: (splits + lists, HKV * HS, N).
    """
    G: tl.constexpr = H // HKV
    i_split, i_head, i_query = tl.program_id(0), tl.program_id(1) // HS, tl.program_id(2)
    i_search = tl.program_id(1) % HS
    splits = tl.num_programs(0) - lists
    let_next_begin(PDL)
    i_own = i_query.to(tl.int64) * HKV + i_head
    p_ints += i_query * (3 + 5 * L) + 3
    _, behind, n, i_tail = _level(p_ints, LEVEL, W)
    above = tl.load(p_ints + 5 * LEVEL - 1)
    i_first, _ = key_begin(p_places + i_query * (3 * L + 2), LEVEL, i_head, HKV, D)
    p_score += (i_own * HS + i_search) * capacity
    i_lists = (i_own * L + LEVEL - 1) * HS * room
    i_list = i_lists + i_search * above
    o_dim = tl.arange(0, BD)
    if HS == 1:  # the sum of the heads' scores is the score of their sum
        o_row = tl.arange(0, GS)
        b_q = load_tile(p_q, i_query.to(tl.int64) * (H * D) + (i_head * G + o_row) * D, o_row < G, D, BD)
        b_q = tl.sum(b_q.to(tl.float32), 0)
    else:
        b_q = tl.load(p_q + i_query.to(tl.int64) * (H * D) + (i_head * G + i_search) * D + o_dim, mask=o_dim < D, other=0.0)
        b_q = b_q.to(tl.float32)
    wait_for_last(PDL)
    if i_split < splits:
        for i in range(i_split * BN, n, splits * BN):
            o_place = i + tl.arange(0, BN)
            o_key, m_key = _candidates(p_lo + i_list, p_hi + i_list, o_place, behind, n, i_tail, W, LEVEL)
            b_k = load_tile(p_anchor, i_first + o_key.to(tl.int64) * D, m_key, D, BD)
            b_s = tl.sum(b_k.to(tl.float32) * b_q[None, :], 1)  # [BN]
            b_s = tl.where(m_key, tl.minimum(ordered(b_s), MOST - 1), LEAST)
            tl.store(p_score + o_place, b_s, mask=o_place < n)
    else:
        for i in range((i_split - splits) * MARKED, above, lists * MARKED):
            o_entry = i + tl.arange(0, MARKED)
            m_entry = o_entry < above
            b_gist = tl.load(p_item + i_list + o_entry, mask=m_entry, other=-1)
            o_entry = tl.minimum(o_entry, above - 1) + i_search * above
            b_before = taken_before(p_item + i_lists, o_entry, b_gist, above, BO)
            tl.store(p_new + i_lists + o_entry, tl.where(b_before > 0, -1, b_gist), mask=m_entry)


@triton.jit
def _equal_until(b_s, o_key, bound, key):
    return tl.sum(((b_s == bound) & (o_key <= key)).to(tl.int32), 0)


@triton.jit
def _positions(b_taken, BS: tl.constexpr, C: tl.constexpr):
    """Numbers for the ones among [BS] zeros and ones, and how many there are. C: threads, each of which holds a column.

    Thread by thread: a running sum in the order of places would pass through all threads for every row of them.
    """
    b_rows = tl.reshape(b_taken, [BS // C, C])
    b_sums = tl.sum(b_rows, 0)
    b_until = tl.cumsum(b_rows, 0) + (tl.cumsum(b_sums, 0) - b_sums)[None, :]
    return tl.reshape(b_until, [BS]) - b_taken, tl.sum(b_sums, 0)


@triton.jit
def _list_taken(
    p_item, p_lo, p_hi, b_s, o_key, o_lo, o_hi, bound, last, items, budget, window, sinks,
    BS: tl.constexpr, C: tl.constexpr, BOTTOM: tl.constexpr,
):  # fmt: skip
    """Append the taken ones of a tile of candidates to the lists; how many entries these have then.

    last: the last gist that is taken for a score equal to the bound.
    """
    b_taken = ((b_s > bound) | ((b_s == bound) & (o_key <= last))) & (b_s > LEAST)
    o_item, count = _positions(b_taken.to(tl.int32), BS, C)
    o_item += items
    m_item = b_taken & (o_item < budget)
    if BOTTOM:  # raw tokens that neither the sinks nor the window hold; this holds a chunk entirely or not at all
        o_lo = tl.maximum(o_lo, sinks)
        o_hi = tl.where(o_hi <= window, o_hi, o_lo)
    tl.store(p_item + o_item, o_key, mask=m_item)
    tl.store(p_lo + o_item, o_lo, mask=m_item)
    tl.store(p_hi + o_item, o_hi, mask=m_item)
    return items + count


@kernel
def select_kernel(
    p_ends, p_ints, p_places, p_score, p_item, p_lo, p_hi, capacity, room,
    HKV: tl.constexpr, L: tl.constexpr, HS: tl.constexpr, BS: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, W: tl.constexpr,
    LEVEL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What one head takes of segment LEVEL: p_item, p_lo, p_hi [N, HKV, L, HS * room], ``budget`` entries after others'.

    WHOLE: BS places are all there can be. C: threads. W: of the level above. Grid: (HS, HKV, N).
    """
    i_search, i_head, i_query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    let_next_begin(PDL)
    i_own = i_query.to(tl.int64) * HKV + i_head
    p_ints += i_query * (3 + 5 * L)
    sinks, window = tl.load(p_ints), tl.load(p_ints + 1)
    budget, behind, n, i_tail = _level(p_ints + 3, LEVEL, W)
    i_end = tl.load(p_ints + 3 + 5 * LEVEL + 2)  # gists of the level
    z, error = normal_quantile(n, budget)
    p_ends += tl.load(p_places + i_query * (3 * L + 2) + 2 * (L + 1) + LEVEL)
    p_score += (i_own * HS + i_search) * capacity
    i_above = (i_own * L + LEVEL - 1) * HS * room + i_search * (behind // W)
    i_list = (i_own * L + LEVEL) * HS * room + i_search * budget
    BOTTOM: tl.constexpr = LEVEL == L - 1
    items = tl.minimum(budget, 0)
    o_place = tl.arange(0, BS)
    if WHOLE and LEVEL == 0:  # the tables stand before the launch
        o_lo, o_hi = _children(p_ends, o_place, o_place < n)
    wait_for_last(PDL)
    b_s = load_scores(p_score, 0, n, BS)
    if WHOLE:  # loaded here, they are there when the search is done
        o_key, m_key = _candidates(p_lo + i_above, p_hi + i_above, o_place, behind, n, i_tail, W, LEVEL)
        if LEVEL > 0:
            o_lo, o_hi = _children(p_ends, o_key, m_key)
    bound, reached, of_equal = find_bound(p_score, b_s, n, budget, z, error, BS, WHOLE)
    last = i_end
    if reached > budget:  # of equal ones the earlier: halving, since ties are rare, and code is read anew by every launch
        first = tl.minimum(budget, 0)
        while first < last:
            middle = (first + last) // 2
            if WHOLE:
                until = _equal_until(b_s, o_key, bound, middle)
            else:
                until = 0
                for i in range(0, n, BS):
                    o_key, _ = _candidates(p_lo + i_above, p_hi + i_above, i + o_place, behind, n, i_tail, W, LEVEL)
                    until += _equal_until(load_scores(p_score, i, n, BS), o_key, bound, middle)
            first = tl.where(until >= of_equal, first, middle + 1)
            last = tl.where(until >= of_equal, middle, last)
    if WHOLE:
        items = _list_taken(
            p_item + i_list, p_lo + i_list, p_hi + i_list, b_s, o_key, o_lo, o_hi, bound, last, items, budget, window, sinks,
            BS, C, BOTTOM,
        )  # fmt: skip
    else:
        for i in range(0, n, BS):
            o_key, m_key = _candidates(p_lo + i_above, p_hi + i_above, i + o_place, behind, n, i_tail, W, LEVEL)
            o_lo, o_hi = _children(p_ends, o_key, m_key)
            items = _list_taken(
                p_item + i_list, p_lo + i_list, p_hi + i_list, load_scores(p_score, i, n, BS), o_key, o_lo, o_hi, bound, last,
                items, budget, window, sinks, BS, C, BOTTOM,
            )  # fmt: skip
    o_fill = tl.arange(0, FILL)
    for i in range(items, budget, FILL):  # fewer candidates than the budget
        m_none = i + o_fill < budget
        tl.store(p_item + i_list + i + o_fill, -1, mask=m_none)
        tl.store(p_lo + i_list + i + o_fill, 0, mask=m_none)
        tl.store(p_hi + i_list + i + o_fill, 0, mask=m_none)
