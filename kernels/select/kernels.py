"""The Triton kernels of selection: per row the bound that exactly its budget of candidates passes, then the lists of blocks.

A row is a query and a query head (each head selects), or a query (the heads' scores are summed: SUM of them). A block of rows
visits its *candidates* in tiles and never stores a score: at the top level a span of gists; below it the children of the
parents that any of its rows selected, side by side, then the span of gists whose parent is still open. Each pass over them
computes the scores anew, which is cheap on tensor cores; the passes search the bound in four-fold steps, over the scores as
ordered integers, and stop as soon as exactly the budget passes. Where scores tie at the bound, a second search over the rows
keeps the earlier gists. So a budget of any size costs about the same, and the result is exact.
"""

import triton
import triton.language as tl

from kernels.compressed.common import dot, in_range, load_tile
from kernels.unfold.common import item_of_place

LEAST: tl.constexpr = tl.constexpr(-2147483648)
MOST: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def any_bit(a, b):
    return a | b


@triton.jit
def ordered(b_s):
    """fp32 -> int32 that compares alike; both zeros are one, and no number becomes LEAST."""
    b_bits = tl.where(b_s == 0.0, 0.0, b_s).to(tl.int32, bitcast=True)
    return tl.where(b_bits >= 0, b_bits, b_bits ^ MOST)


@triton.jit
def _rows(p_blocks, i_block, i_head, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, SUM: tl.constexpr):
    """Of a block: sample; per row: exists, query, number of the query within the block, offset of its (first) head in q."""
    PER: tl.constexpr = H // HKV // SUM  # rows per query
    i_first, i_last = tl.load(p_blocks + i_block * 3), tl.load(p_blocks + i_block * 3 + 1)
    o_row = tl.arange(0, BM)
    m_row = o_row < (i_last - i_first) * PER
    o_query = i_first + o_row // PER
    o_q = o_query.to(tl.int64) * (H * D) + (i_head * (H // HKV) + o_row % PER * SUM) * D
    return tl.load(p_blocks + i_block * 3 + 2), m_row, o_query, tl.minimum(o_row // PER, 31), o_q


@triton.jit
def _span(b_lo, b_hi):
    """The first of the rows that ranges [lo, hi) span, and how many these are."""
    i_first = tl.min(tl.where(b_hi > b_lo, b_lo, MOST), 0)
    return i_first, tl.maximum(tl.max(tl.where(b_hi > b_lo, b_hi, 0), 0) - i_first, 0)


@triton.jit
def _candidates(
    p_row, p_words, p_place, p_child_lo, p_child_hi, i, i_item, items, places, i_span, span, b_lo, b_hi,
    BM: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Key rows at the places i .. i + BN, bool [rows, keys] whose candidates they are, the item the next tile begins in.

    ``p_words`` [items, WORDS]: bit r of word w says that row 32 * w + r selected the parent.
    """
    o_place = i + tl.arange(0, BN)
    o_key = i_span + o_place - places
    m_range = (o_place >= places) & (o_place < places + span)
    m_seen = m_range[None, :] & in_range(o_key[None, :], b_lo[:, None], b_hi[:, None])
    if not TOP:
        o_item, i_item = item_of_place(p_place, i_item, items, o_place, i + BN, BN)
        m_place = o_place < places
        o_parent = tl.load(p_row + o_item, mask=m_place, other=0)
        o_child = tl.load(p_child_lo + o_parent, mask=m_place, other=0) + o_place
        o_child -= tl.load(p_place + o_item, mask=m_place, other=0)
        m_place = m_place & (o_child < tl.load(p_child_hi + o_parent, mask=m_place, other=0))
        o_key = tl.where(m_place, o_child, tl.where(m_range, o_key, -1))
        o_row = tl.arange(0, BM)
        for w in tl.static_range(WORDS):
            b_word = tl.load(p_words + o_item.to(tl.int64) * WORDS + w, mask=m_place, other=0)
            m_bit = ((b_word[None, :] >> (o_row % 32)[:, None]) & 1) != 0
            m_seen = m_seen | (m_bit & (o_row // 32 == w)[:, None])
    else:
        o_key = tl.where(m_range, o_key, -1)
    return o_key, m_seen, i_item


@triton.jit
def _tile(
    b_q, p_q, o_q, m_row, p_k, p_row, p_words, p_place, p_child_lo, p_child_hi, i, i_item, items, places,
    i_span, span, b_lo, b_hi,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUM: tl.constexpr, WORDS: tl.constexpr, TOP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Key rows at the places i .. i + BN, their ordered scores [rows, keys], LEAST for no candidate, and the next tile's item.

    The same score has the same bits in every pass and kernel.
    """
    o_key, m_seen, i_item = _candidates(
        p_row, p_words, p_place, p_child_lo, p_child_hi, i, i_item, items, places, i_span, span, b_lo, b_hi, BM, BN, WORDS, TOP
    )
    b_k = tl.trans(load_tile(p_k, o_key.to(tl.int64) * (HKV * D), o_key >= 0, D, BD))
    b_s = dot(b_q, b_k, UPCAST)
    for h in range(1, SUM):
        b_s += dot(load_tile(p_q, o_q + h * D, m_row, D, BD), b_k, UPCAST)
    return o_key, tl.where(m_seen, ordered(b_s), LEAST), i_item


@triton.jit
def narrow(b_from, b_to, b_count, b_over, b_more, b_1, b_2, b_3, b_over_1, b_over_2, b_over_3, b_budget):
    """One step of the search, where ``more`` holds: the quarter of from .. to in which the budget is reached.

    ``count`` scores are >= from, ``over`` >= to; ``over_1`` .. ``over_3`` >= the three bounds between. Invariant: count is at
    least the budget, over less. Done where exactly the budget is >= from, or from is the only score left.
    """
    m_1, m_2, m_3 = b_over_1 >= b_budget, b_over_2 >= b_budget, b_over_3 >= b_budget
    b_next = tl.where(m_3, b_to, tl.where(m_2, b_3, tl.where(m_1, b_2, b_1)).to(tl.int64))
    b_next_over = tl.where(m_3, b_over, tl.where(m_2, b_over_3, tl.where(m_1, b_over_2, b_over_1)))
    b_from = tl.where(b_more & m_1, tl.where(m_3, b_3, tl.where(m_2, b_2, b_1)).to(tl.int64), b_from)
    b_count = tl.where(b_more & m_1, tl.where(m_3, b_over_3, tl.where(m_2, b_over_2, b_over_1)), b_count)
    b_to = tl.where(b_more, b_next, b_to)
    b_over = tl.where(b_more, b_next_over, b_over)
    return b_from, b_to, b_count, b_over, (b_count > b_budget) & (b_to - b_from > 1)


@triton.jit
def bound_kernel(
    p_q, p_k, p_lo, p_hi, p_budget, p_blocks, p_first, p_row, p_words, p_place, p_places, p_child_lo, p_child_hi,
    p_bound, p_last, p_count, keys, tokens,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUM: tl.constexpr, WORDS: tl.constexpr, TOP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per row: candidates over ``bound``, or equal to it and in a key row up to ``last``, are taken; [lists, BM] int32 each.

    And ``count`` [lists] int32: keys that any row of the block takes. p_lo, p_hi [N]: the range of candidates that need no
    selected parent; p_budget [N]. p_first, p_row, p_words, p_place, p_places: the lists one level up, as :func:`list_kernel`
    writes them.
    Grid: (blocks, HKV).
    """
    i_block, i_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_list = i_block * HKV + i_head
    i_sample, m_row, o_query, o_bit, o_q = _rows(p_blocks, i_block, i_head, H, HKV, D, BM, SUM)
    p_k += i_sample.to(tl.int64) * keys * (HKV * D) + i_head * D
    p_child_lo += i_sample.to(tl.int64) * tokens
    p_child_hi += i_sample.to(tl.int64) * tokens
    b_q = load_tile(p_q, o_q, m_row, D, BD)
    b_lo = tl.load(p_lo + o_query, mask=m_row, other=0)
    b_hi = tl.load(p_hi + o_query, mask=m_row, other=0)
    i_span, span = _span(b_lo, b_hi)
    items, places = 0, 0
    if not TOP:
        i_first = tl.load(p_first + i_list)
        items = (tl.load(p_first + i_list + 1) - i_first).to(tl.int32)
        places = tl.load(p_places + i_list)
        p_row += i_first
        p_place += i_first
        p_words += i_first * WORDS

    b_most = tl.full([BM], LEAST, tl.int32)
    b_least = tl.full([BM], MOST, tl.int32)
    b_count = tl.zeros([BM], tl.int32)
    i_item = 0
    for i in range(0, places + span, BN):
        o_key, b_s, i_item = _tile(
            b_q, p_q, o_q, m_row, p_k, p_row, p_words, p_place, p_child_lo, p_child_hi, i, i_item, items, places,
            i_span, span, b_lo, b_hi, HKV, D, BD, BM, BN, SUM, WORDS, TOP, UPCAST,
        )  # fmt: skip
        b_most = tl.maximum(b_most, tl.max(b_s, 1))
        b_least = tl.minimum(b_least, tl.min(tl.where(b_s > LEAST, b_s, MOST), 1))
        b_count += tl.sum((b_s > LEAST).to(tl.int32), 1)
    b_budget = tl.minimum(tl.load(p_budget + o_query, mask=m_row, other=0), b_count)

    # 64 bits hold the difference of two scores.
    b_from = b_least.to(tl.int64)
    b_to = b_most.to(tl.int64) + 1
    b_over = tl.zeros([BM], tl.int32)  # candidates >= to
    b_more = (b_count > b_budget) & (b_to - b_from > 1)
    while tl.max(b_more.to(tl.int32), 0) > 0:
        b_width = tl.where(b_more, b_to - b_from, 0)
        b_1 = (b_from + b_width // 4).to(tl.int32)
        b_2 = (b_from + b_width // 2).to(tl.int32)
        b_3 = (b_from + b_width // 4 * 3 + b_width % 4 * 3 // 4).to(tl.int32)
        b_over_1 = tl.zeros([BM], tl.int32)
        b_over_2 = tl.zeros([BM], tl.int32)
        b_over_3 = tl.zeros([BM], tl.int32)
        i_item = 0
        for i in range(0, places + span, BN):
            o_key, b_s, i_item = _tile(
                b_q, p_q, o_q, m_row, p_k, p_row, p_words, p_place, p_child_lo, p_child_hi, i, i_item, items, places,
                i_span, span, b_lo, b_hi, HKV, D, BD, BM, BN, SUM, WORDS, TOP, UPCAST,
            )  # fmt: skip
            b_over_1 += tl.sum((b_s >= b_1[:, None]).to(tl.int32), 1)
            b_over_2 += tl.sum((b_s >= b_2[:, None]).to(tl.int32), 1)
            b_over_3 += tl.sum((b_s >= b_3[:, None]).to(tl.int32), 1)
        b_from, b_to, b_count, b_over, b_more = narrow(
            b_from, b_to, b_count, b_over, b_more, b_1, b_2, b_3, b_over_1, b_over_2, b_over_3, b_budget
        )
    b_bound = b_from.to(tl.int32)

    # Where more than the budget reach the bound, they are equal to it but for ``over``: of these the first rows are taken.
    b_last = tl.where(b_count > b_budget, keys, MOST)
    b_before = tl.full([BM], -1, tl.int32)
    b_more = b_count > b_budget
    while tl.max(b_more.to(tl.int32), 0) > 0:
        b_middle = b_before + (tl.where(b_more, b_last, 0) - tl.where(b_more, b_before, 0)) // 2
        b_equal = tl.zeros([BM], tl.int32)
        i_item = 0
        for i in range(0, places + span, BN):
            o_key, b_s, i_item = _tile(
                b_q, p_q, o_q, m_row, p_k, p_row, p_words, p_place, p_child_lo, p_child_hi, i, i_item, items, places,
                i_span, span, b_lo, b_hi, HKV, D, BD, BM, BN, SUM, WORDS, TOP, UPCAST,
            )  # fmt: skip
            b_equal += tl.sum(((b_s == b_bound[:, None]) & (o_key[None, :] <= b_middle[:, None])).to(tl.int32), 1)
        m_enough = b_equal >= b_budget - b_over
        b_last = tl.where(b_more & m_enough, b_middle, b_last)
        b_before = tl.where(b_more & (b_equal < b_budget - b_over), b_middle, b_before)
        b_more = b_more & (b_last - b_before > 1)

    o_state = i_list.to(tl.int64) * BM + tl.arange(0, BM)
    tl.store(p_bound + o_state, b_bound)
    tl.store(p_last + o_state, b_last)
    taken = 0
    i_item = 0
    for i in range(0, places + span, BN):
        o_key, b_s, i_item = _tile(
            b_q, p_q, o_q, m_row, p_k, p_row, p_words, p_place, p_child_lo, p_child_hi, i, i_item, items, places,
            i_span, span, b_lo, b_hi, HKV, D, BD, BM, BN, SUM, WORDS, TOP, UPCAST,
        )  # fmt: skip
        m_taken = _taken(b_s, o_key, b_bound, b_last)
        taken += tl.sum(tl.max(m_taken.to(tl.int32), 0), 0)
    tl.store(p_count + i_list, taken)


@triton.jit
def _taken(b_s, o_key, b_bound, b_last):
    """bool [rows, keys]"""
    m_equal = (b_s == b_bound[:, None]) & (o_key[None, :] <= b_last[:, None])
    return (b_s > LEAST) & ((b_s > b_bound[:, None]) | m_equal)


@triton.jit
def list_kernel(
    p_q, p_k, p_lo, p_hi, p_blocks, p_first, p_row, p_words, p_place, p_places, p_child_lo, p_child_hi,
    p_bound, p_last, p_new_first, p_new_row, p_new_bits, p_new_words, p_new_place, p_new_places, keys, tokens,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUM: tl.constexpr, WORDS: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The lists of a level: key row, bits of the queries, words of bits of the rows, and where the children lie side by side.

    The place of an item is that of its first child (BOTTOM: of the gist itself, followed by its raw tokens); an item without
    children takes a place all the same. Grid: (blocks, HKV).
    """
    i_block, i_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_list = i_block * HKV + i_head
    i_sample, m_row, o_query, o_bit, o_q = _rows(p_blocks, i_block, i_head, H, HKV, D, BM, SUM)
    p_k += i_sample.to(tl.int64) * keys * (HKV * D) + i_head * D
    p_child_lo += i_sample.to(tl.int64) * tokens
    p_child_hi += i_sample.to(tl.int64) * tokens
    b_q = load_tile(p_q, o_q, m_row, D, BD)
    b_lo = tl.load(p_lo + o_query, mask=m_row, other=0)
    b_hi = tl.load(p_hi + o_query, mask=m_row, other=0)
    i_span, span = _span(b_lo, b_hi)
    items, places = 0, 0
    if not TOP:
        i_first = tl.load(p_first + i_list)
        items = (tl.load(p_first + i_list + 1) - i_first).to(tl.int32)
        places = tl.load(p_places + i_list)
        p_row += i_first
        p_place += i_first
        p_words += i_first * WORDS
    o_row = tl.arange(0, BM)
    b_bound = tl.load(p_bound + i_list.to(tl.int64) * BM + o_row)
    b_last = tl.load(p_last + i_list.to(tl.int64) * BM + o_row)
    i_new = tl.load(p_new_first + i_list)
    i_end = tl.load(p_new_first + i_list + 1)
    i_place = 0
    i_item = 0
    for i in range(0, places + span, BN):
        o_key, b_s, i_item = _tile(
            b_q, p_q, o_q, m_row, p_k, p_row, p_words, p_place, p_child_lo, p_child_hi, i, i_item, items, places,
            i_span, span, b_lo, b_hi, HKV, D, BD, BM, BN, SUM, WORDS, TOP, UPCAST,
        )  # fmt: skip
        b_taken = _taken(b_s, o_key, b_bound, b_last).to(tl.int32)
        b_any = tl.max(b_taken, 0)
        o_new = i_new + tl.cumsum(b_any, 0) - 1
        m_new = (b_any > 0) & (o_new < i_end)
        b_width = tl.load(p_child_hi + o_key, mask=m_new, other=0) - tl.load(p_child_lo + o_key, mask=m_new, other=0)
        b_width = tl.where(m_new, b_width + 1 if BOTTOM else tl.maximum(b_width, 1), 0)
        tl.store(p_new_row + o_new, o_key, mask=m_new)
        tl.store(p_new_bits + o_new, tl.reduce(b_taken << o_bit[:, None], 0, any_bit), mask=m_new)
        tl.store(p_new_place + o_new, i_place + tl.cumsum(b_width, 0) - b_width, mask=m_new)
        if not BOTTOM:
            for w in tl.static_range(WORDS):
                b_word = tl.where((o_row // 32 == w)[:, None], b_taken << (o_row % 32)[:, None], 0)
                tl.store(p_new_words + o_new * WORDS + w, tl.reduce(b_word, 0, any_bit), mask=m_new)
        i_new += tl.sum(b_any, 0)
        i_place += tl.sum(b_width, 0)
    tl.store(p_new_places + i_list, i_place)
