"""The Triton kernels of selection: per row the bound that exactly its budget of candidates passes, then the lists of blocks.

A row is a query and a query head (each head selects), or a query (the heads' scores are summed: SUM of them). A block of rows
visits its *candidates* in tiles: at the top level a span of gists; below it the children of the parents that any of its rows
selected, side by side, then the span of gists whose parent is still open. Each pass over them computes the scores anew,
which is cheap on tensor cores. A pass counts the scores that reach two guessed bounds (kernels/select/search.py), and *holds*
those between them: of each row at most HELD, in a scratch that stays in the L2 cache. As soon as the wanted bound is among
what is held, the search goes on there and no key is read any more. So one pass is the rule: the first at the top, after a
sample of a few tiles, and below it the first where a row has no more than HELD candidates, else the second.
Where scores tie at the bound, the earlier gists are kept. A budget of any size costs about the same, and the result is exact.
"""

import triton
import triton.language as tl

from unfold.kernels.compressed.common import dot, in_range, load_tile
from unfold.kernels.select.search import LEAST, MOST, held_bounds, moments, narrow, narrow_two, ordered, spread_of, three_bounds
from unfold.kernels.unfold.common import item_of_place

SAMPLE: tl.constexpr = tl.constexpr(4)  # tiles of the top level from which the spread of its scores is guessed


@triton.jit
def any_bit(a, b):
    return a | b


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
def _load_slice(p_x, o_x, m_x, i_dim, D: tl.constexpr, BS: tl.constexpr):
    """Tile [n, BS], the elements from i_dim on of rows that begin at offsets o_x [n]; zero outside the mask and beyond D."""
    o_dim = i_dim + tl.arange(0, BS)
    return tl.load(p_x + o_x[:, None] + o_dim[None, :], mask=m_x[:, None] & (o_dim < D)[None, :], other=0.0)


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
    o_k = o_key.to(tl.int64) * (HKV * D)
    BS: tl.constexpr = min(BD, 64)
    if (p_k.dtype.element_ty == tl.float32 or SUM > 1) and BD > BS:
        # Registers: fp32 products run without tensor cores, each thread holding whole rows of its operands; sums of heads load
        # every head's queries anew in any case. So a slice of the dimension after another.
        b_s = tl.zeros([BM, BN], tl.float32)
        for i_dim in range(0, BD, BS):
            b_k = tl.trans(_load_slice(p_k, o_k, o_key >= 0, i_dim, D, BS))
            for h in range(0, SUM):
                b_s += dot(_load_slice(p_q, o_q + h * D, m_row, i_dim, D, BS), b_k, UPCAST)
    else:
        b_k = tl.trans(load_tile(p_k, o_k, o_key >= 0, D, BD))
        b_s = dot(b_q, b_k, UPCAST)
        for h in range(1, SUM):
            b_s += dot(load_tile(p_q, o_q + h * D, m_row, D, BD), b_k, UPCAST)
    return o_key, tl.where(m_seen, ordered(b_s), LEAST), i_item


@triton.jit
def _hold(b_s, b_1, b_2, b_held, p_held, o_row, HELD: tl.constexpr):
    """Per row the scores of a tile that reach each of two bounds; what lies between them is held, behind the ``held`` before."""
    b_two = (b_s >= b_1[:, None]).to(tl.int32) + ((b_s >= b_2[:, None]).to(tl.int32) << 16)
    m_held = b_two == 1
    o_held = b_held[:, None] + tl.cumsum(m_held.to(tl.int32), 1) - 1
    tl.store(p_held + o_row[:, None] * HELD + o_held, b_s, mask=m_held & (o_held < HELD))
    b_two = tl.sum(b_two, 1)
    return b_two & 0xFFFF, b_two >> 16


@triton.jit
def _held(p_held, i, b_held, o_row, HELD: tl.constexpr, BH: tl.constexpr):
    """Held scores i .. i + BH of every row, LEAST behind the last."""
    o_held = i + tl.arange(0, BH)
    return tl.load(p_held + o_row[:, None] * HELD + o_held[None, :], mask=o_held[None, :] < b_held[:, None], other=LEAST)


@triton.jit
def _bound_among(
    p_held, o_row, b_from, b_to, b_count, b_over, b_budget, m_kept, b_mean, b_std, HELD: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """The rest of the search, among held scores: from, count and over at its end."""
    m_quarter = b_count < 0  # nowhere yet
    b_above, b_held = b_over, tl.where(m_kept, b_count - b_over, 0)
    b_more = m_kept & (b_to - b_from > 1)
    while tl.max(b_more.to(tl.int32), 0) > 0:
        b_1, b_2, b_3 = three_bounds(b_from, b_to, b_count, b_over, b_budget, b_more, b_mean, b_std, False, m_quarter)
        b_over_1, b_over_2, b_over_3 = b_above, b_above, b_above
        for i in range(0, tl.max(b_held, 0), BH):
            b_s = _held(p_held, i, b_held, o_row, HELD, BH)
            b_over_1 += tl.sum((b_s >= b_1[:, None]).to(tl.int32), 1)
            b_over_2 += tl.sum((b_s >= b_2[:, None]).to(tl.int32), 1)
            b_over_3 += tl.sum((b_s >= b_3[:, None]).to(tl.int32), 1)
        b_left = b_count - b_over
        b_from, b_to, b_count, b_over, b_more = narrow(
            b_from, b_to, b_count, b_over, b_more, b_1, b_2, b_3, b_over_1, b_over_2, b_over_3, b_budget
        )
        m_quarter = (m_quarter == 0) & (2 * (b_count - b_over) > b_left)
    return b_from, b_count, b_over


@triton.jit
def bound_kernel(
    p_q, p_k, p_lo, p_hi, p_budget, p_blocks, p_first, p_row, p_words, p_place, p_places, p_child_lo, p_child_hi,
    p_bound, p_last, p_count, p_held, lists, keys, tokens,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUM: tl.constexpr, WORDS: tl.constexpr, TOP: tl.constexpr, HELD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per row: candidates over ``bound``, or equal to it and in a key row up to ``last``, are taken; [lists, BM] int32 each.

    And ``count`` [lists] int32: keys that any row of the block takes. p_lo, p_hi [N]: the range of candidates that need no
    selected parent; p_budget [N]. p_first, p_row, p_words, p_place, p_places: the lists one level up, as :func:`list_kernel`
    writes them. p_held: scratch of each program, [programs, BM, HELD] int32.
    Grid: (programs,); each works through every so-many-th list, the last blocks first, which have most to do.
    """
    o_own = tl.program_id(0).to(tl.int64) * (BM * HELD)
    for i in range(tl.program_id(0), lists, tl.num_programs(0)):
        _bound_list(
            lists - 1 - i, p_q, p_k, p_lo, p_hi, p_budget, p_blocks, p_first, p_row, p_words, p_place, p_places, p_child_lo,
            p_child_hi, p_bound, p_last, p_count, p_held + o_own, keys, tokens,
            H, HKV, D, BD, BM, BN, SUM, WORDS, TOP, HELD, UPCAST,
        )  # fmt: skip


@triton.jit
def _bound_list(
    i_list, p_q, p_k, p_lo, p_hi, p_budget, p_blocks, p_first, p_row, p_words, p_place, p_places, p_child_lo, p_child_hi,
    p_bound, p_last, p_count, p_held, keys, tokens,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUM: tl.constexpr, WORDS: tl.constexpr, TOP: tl.constexpr, HELD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_block, i_head = i_list // HKV, i_list % HKV
    i_sample, m_row, o_query, o_bit, o_q = _rows(p_blocks, i_block, i_head, H, HKV, D, BM, SUM)
    p_k += i_sample.to(tl.int64) * keys * (HKV * D) + i_head * D
    p_child_lo += i_sample.to(tl.int64) * tokens
    p_child_hi += i_sample.to(tl.int64) * tokens
    b_q = load_tile(p_q, o_q, m_row, D, BD)
    b_lo = tl.load(p_lo + o_query, mask=m_row, other=0)
    b_hi = tl.load(p_hi + o_query, mask=m_row, other=0)
    b_budget = tl.load(p_budget + o_query, mask=m_row, other=0)
    i_span, span = _span(b_lo, b_hi)
    items, places = 0, 0
    if not TOP:
        i_first = tl.load(p_first + i_list)
        items = (tl.load(p_first + i_list + 1) - i_first).to(tl.int32)
        places = tl.load(p_places + i_list)
        p_row += i_first
        p_place += i_first
        p_words += i_first * WORDS

    # A few tiles say how the scores at the top are spread; below, the first pass does, and it may be the only one.
    BH: tl.constexpr = min(HELD, BN)
    o_row = tl.arange(0, BM)
    b_n = tl.zeros([BM], tl.int32)
    b_sum = tl.zeros([BM], tl.float32)
    b_square = tl.zeros([BM], tl.float32)
    b_count = tl.full([BM], MOST, tl.int32)
    if TOP:
        b_count = tl.maximum(b_hi - b_lo, 0)
        b_budget = tl.minimum(b_budget, b_count)
        sampled = tl.where(tl.max(b_count, 0) > HELD, span, 0)
        for i in range(0, sampled, tl.cdiv(tl.maximum(sampled, 1), SAMPLE * BN) * BN):
            o_key, b_s, _ = _tile(
                b_q, p_q, o_q, m_row, p_k, p_row, p_words, p_place, p_child_lo, p_child_hi, i, 0, items, places,
                i_span, span, b_lo, b_hi, HKV, D, BD, BM, BN, SUM, WORDS, TOP, UPCAST,
            )  # fmt: skip
            b_tile_n, b_tile_sum, b_tile_square = moments(b_s)
            b_n += b_tile_n
            b_sum += b_tile_sum
            b_square += b_tile_square
    b_mean, b_std = spread_of(b_n, b_sum, b_square)
    b_from = tl.full([BM], LEAST + 1, tl.int64)
    b_to = tl.full([BM], MOST, tl.int64)
    b_over = tl.zeros([BM], tl.int32)
    b_more = m_row & (b_count > b_budget)
    m_kept = b_count < 0  # no row yet whose bound lies among its held scores
    m_thirds = b_count < 0
    b_1, b_2 = b_from.to(tl.int32), b_to.to(tl.int32)
    if TOP:
        b_1, b_2 = held_bounds(b_from, b_to, b_count, b_over, b_budget, b_mean, b_std, True, HELD, m_thirds)
    guessed = 1 if TOP else 0
    while tl.max(b_more.to(tl.int32), 0) > 0:
        b_1 = tl.where(b_more, b_1, MOST)
        b_2 = tl.where(b_more, b_2, MOST)
        b_over_1 = tl.zeros([BM], tl.int32)
        b_over_2 = tl.zeros([BM], tl.int32)
        tl.debug_barrier()  # nobody reads what was held before
        i_item = 0
        for i in range(0, places + span, BN):
            o_key, b_s, i_item = _tile(
                b_q, p_q, o_q, m_row, p_k, p_row, p_words, p_place, p_child_lo, p_child_hi, i, i_item, items, places,
                i_span, span, b_lo, b_hi, HKV, D, BD, BM, BN, SUM, WORDS, TOP, UPCAST,
            )  # fmt: skip
            b_tile_1, b_tile_2 = _hold(b_s, b_1, b_2, b_over_1 - b_over_2, p_held, o_row, HELD)
            b_over_1 += b_tile_1
            b_over_2 += b_tile_2
        tl.debug_barrier()  # the program reads what it wrote
        if guessed == 0:  # all candidates were counted, and the first ones of each row held: its sample
            b_count = b_over_1
            b_budget = tl.minimum(b_budget, b_count)
            b_mean, b_std = spread_of(*moments(_held(p_held, 0, b_count, o_row, HELD, BH)))
        b_left = b_count - b_over
        b_from, b_to, b_count, b_over = narrow_two(b_from, b_to, b_count, b_over, b_more, b_1, b_2, b_over_1, b_over_2, b_budget)
        b_more = b_more & (b_count > b_budget)
        m_kept = m_kept | (b_more & (b_from == b_1) & (b_to == b_2) & (b_count - b_over <= HELD))
        b_more = b_more & (b_to - b_from > 1) & (m_kept == 0)
        m_thirds = (m_thirds == 0) & (2 * (b_count - b_over) > b_left) & (guessed > 0)
        b_1, b_2 = held_bounds(b_from, b_to, b_count, b_over, b_budget, b_mean, b_std, False, HELD, m_thirds)
        guessed = 1

    if tl.max(m_kept.to(tl.int32), 0) > 0:
        b_found, b_found_count, b_found_over = _bound_among(
            p_held, o_row, b_from, b_to, b_count, b_over, b_budget, m_kept, b_mean, b_std, HELD, BH
        )
        b_from = tl.where(m_kept, b_found, b_from)
        b_count = tl.where(m_kept, b_found_count, b_count)
        b_over = tl.where(m_kept, b_found_over, b_over)
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
