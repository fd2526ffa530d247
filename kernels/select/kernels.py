"""The Triton kernels of selection: per row the bound that exactly its budget of candidates passes, then the lists of blocks.

A row is a query and a query head (each head selects), or a query (the heads' scores are summed: SUM of them). A block of rows has
*candidates*, which stand in places: at the top level a span of gists; below it the children of the parents that any of its rows
selected, side by side, then the span of gists whose parent is still open. Four launches go through a level:

- :func:`score_kernel` scores every candidate against every row, once, into a scratch of ordered integers;
- :func:`bound_kernel` finds each row's bound among its scores, which its program holds in registers;
- :func:`mark_kernel` says which rows take each candidate, and how long the lists become;
- :func:`list_kernel` writes the lists, and the candidates of the level below.

The scratch is [lists, BM, room] for as many lists as fit a bounded memory: no program waits for another, and no key is read
twice. Where scores tie at a bound, the earlier gists are taken. A budget of any size costs the same, and the result is exact.
"""

import triton
import triton.language as tl

from unfold.kernels.common.search import LEAST, MOST, find_bound, load_scores, normal_quantile, ordered
from unfold.kernels.common.tl import dot, in_range, kernel, load_tile

# The room of a row in the scratch is a multiple of it, which the compiler sees only where it multiplies: it then loads 16 bytes.
ROOM_UNIT: tl.constexpr = tl.constexpr(16)


@triton.jit
def any_bit(a, b):
    return a | b


@triton.jit
def count_bits(b_x):
    """How many bits of each int32 are set."""
    b_x = b_x.to(tl.uint32, bitcast=True)
    b_x = b_x - ((b_x >> 1) & 0x55555555)
    b_x = (b_x & 0x33333333) + ((b_x >> 2) & 0x33333333)
    b_x = (b_x + (b_x >> 4)) & 0x0F0F0F0F
    return ((b_x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def block_rows(
    p_blocks, i_block, i_head, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    """Of a block: sample; per row [BM]: exists, query, offset of its (first) head in q."""
    PER: tl.constexpr = H // HKV // SUM  # rows per query
    i_first, i_last = tl.load(p_blocks + i_block * 3), tl.load(p_blocks + i_block * 3 + 1)
    o_row = tl.arange(0, BM)
    m_row = o_row < (i_last - i_first) * PER
    o_query = i_first + o_row // PER
    o_q = o_query.to(tl.int64) * (H * D) + (i_head * (H // HKV) + o_row % PER * SUM) * D
    return tl.load(p_blocks + i_block * 3 + 2), m_row, o_query, o_q


@triton.jit
def _load_slice(p_x, o_x, m_x, i_dim, D: tl.constexpr, BS: tl.constexpr):
    """Tile [n, BS], the elements from i_dim on of rows that begin at offsets o_x [n]; zero outside the mask and beyond D."""
    o_dim = i_dim + tl.arange(0, BS)
    return tl.load(p_x + o_x[:, None] + o_dim[None, :], mask=m_x[:, None] & (o_dim < D)[None, :], other=0.0)


@triton.jit
def _scores(
    b_q, p_q, o_q, m_row, p_k, o_key, m_key,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUM: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """fp32 [rows, keys], summed over SUM heads."""
    o_k = o_key.to(tl.int64) * (HKV * D)
    BS: tl.constexpr = min(BD, 64)
    if (p_k.dtype.element_ty == tl.float32 or SUM > 1) and BD > BS:
        # Registers: fp32 products run without tensor cores, each thread holding whole rows of its operands; sums of heads load
        # every head's queries anew in any case. So a slice of the dimension after another.
        b_s = tl.zeros([BM, BN], tl.float32)
        for i_dim in range(0, BD, BS):
            b_k = tl.trans(_load_slice(p_k, o_k, m_key, i_dim, D, BS))  # [BS, BN]
            for h in range(0, SUM):
                b_s += dot(_load_slice(p_q, o_q + h * D, m_row, i_dim, D, BS), b_k, UPCAST)
    else:
        b_k = tl.trans(load_tile(p_k, o_k, m_key, D, BD))  # [BD, BN]
        b_s = dot(b_q, b_k, UPCAST)
        for h in range(1, SUM):
            b_s += dot(load_tile(p_q, o_q + h * D, m_row, D, BD), b_k, UPCAST)
    return b_s


@kernel
def score_kernel(
    p_q, p_k, p_lo, p_hi, p_blocks, p_spans, p_begin, p_places, p_key, p_words, p_score, i_from, room, keys,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUM: tl.constexpr, WORDS: tl.constexpr, TOP: tl.constexpr, TILES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Ordered scores [lists, BM, room * 16] int32 of the lists from i_from on; LEAST where a place is no candidate of a row.

    At the top p_spans [blocks, 2] and p_lo, p_hi [N] say what the candidates are. Below: p_begin [lists + 1] int64, p_places
    [lists], p_key [places], p_words [places, WORDS]: bit r of word w says that the place is a candidate of row 32 * w + r.
    Grid: (lists, TILES tiles of places each).
    """
    i_list = i_from + tl.program_id(0)
    i_block, i_head = i_list // HKV, i_list % HKV
    if TOP:
        i_span, n = tl.load(p_spans + i_block * 2), tl.load(p_spans + i_block * 2 + 1)
    else:
        n = tl.load(p_places + i_list)
        i_begin = tl.load(p_begin + i_list)
        p_key += i_begin
        p_words += i_begin * WORDS
    i_first = tl.program_id(1) * (TILES * BN)
    if i_first < n:
        i_sample, m_row, o_query, o_q = block_rows(p_blocks, i_block, i_head, H, HKV, D, BM, SUM)
        b_q = load_tile(p_q, o_q, m_row, D, BD)  # [BM, BD]
        p_k += i_sample.to(tl.int64) * keys * (HKV * D) + i_head * D
        o_row = tl.arange(0, BM)
        o_score = (tl.program_id(0) * BM + o_row).to(tl.int64) * (room * ROOM_UNIT)
        if TOP:
            b_lo = tl.load(p_lo + o_query, mask=m_row, other=0)
            b_hi = tl.load(p_hi + o_query, mask=m_row, other=0)
        for i in range(i_first, tl.minimum(n, i_first + TILES * BN), BN):
            o_place = i + tl.arange(0, BN)
            m_place = o_place < n
            if TOP:
                o_key = i_span + o_place
                m_seen = in_range(o_key[None, :], b_lo[:, None], b_hi[:, None])  # [BM, BN]
            else:
                o_key = tl.load(p_key + o_place, mask=m_place, other=0)
                m_seen = tl.zeros([BM, BN], tl.int1)
                for w in tl.static_range(WORDS):
                    b_word = tl.load(p_words + o_place * WORDS + w, mask=m_place, other=0)
                    m_bit = ((b_word[None, :] >> (o_row % 32)[:, None]) & 1) != 0
                    m_seen = m_seen | (m_bit & (o_row // 32 == w)[:, None])
            b_s = _scores(b_q, p_q, o_q, m_row, p_k, o_key, m_place, HKV, D, BD, BM, BN, SUM, UPCAST)
            b_s = tl.where(m_seen, ordered(b_s), LEAST)
            tl.store(p_score + o_score[:, None] + o_place[None, :], b_s, mask=m_place[None, :])


@kernel
def bound_kernel(
    p_score, p_budget, p_blocks, p_spans, p_places, p_bound, p_last, i_from, room,
    HKV: tl.constexpr, BM: tl.constexpr, PER: tl.constexpr, TOP: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Per row: scores over ``bound``, or equal to it and in a place up to ``last``, are taken; [lists, BM] int32 each.

    p_budget [N] by query. WHOLE: no row has more than N candidates, so that they stay in registers; else N after another.
    Grid: (lists, BM).
    """
    i_slot, i_row = tl.program_id(0), tl.program_id(1)
    i_list = i_from + i_slot
    i_block = i_list // HKV
    n = tl.load(p_spans + i_block * 2 + 1) if TOP else tl.load(p_places + i_list)
    i_query = tl.load(p_blocks + i_block * 3) + i_row // PER
    m_row = i_query < tl.load(p_blocks + i_block * 3 + 1)
    n = tl.where(m_row, n, 0)
    budget = tl.load(p_budget + i_query, mask=m_row, other=0)
    p_score += (i_slot * BM + i_row).to(tl.int64) * (room * ROOM_UNIT)

    b_s = load_scores(p_score, 0, n, N)  # [N]
    count = tl.sum((b_s > LEAST).to(tl.int32), 0)
    if not WHOLE:
        for i in range(N, n, N):
            count += tl.sum((load_scores(p_score, i, n, N) > LEAST).to(tl.int32), 0)
    z, error = normal_quantile(count, budget)
    bound, count, wanted = find_bound(p_score, b_s, n, budget, z, error, N, WHOLE)

    # Where more than the budget reach the bound, only ``wanted`` of those equal to it are taken: the first places.
    i_last = tl.full([], MOST, tl.int32)
    if count > budget:
        i_last = tl.full([], -1, tl.int32)
        before = wanted * 0
        for i in range(0, n, N):
            if not WHOLE:
                b_s = load_scores(p_score, i, n, N)
            b_equal = (b_s == bound).to(tl.int32)
            b_rank = before + tl.cumsum(b_equal, 0)
            m_taken = (b_equal > 0) & (b_rank <= wanted)
            i_last = tl.maximum(i_last, tl.max(tl.where(m_taken, i + tl.arange(0, N), -1), 0))
            before += tl.sum(b_equal, 0)
    tl.store(p_bound + i_slot * BM + i_row, bound)
    tl.store(p_last + i_slot * BM + i_row, i_last)


@kernel
def mark_kernel(
    p_score, p_bound, p_last, p_spans, p_next_spans, p_begin, p_places, p_key, p_child_lo, p_child_hi, p_blocks,
    p_taken, p_count, p_next_places, i_from, room, tokens,
    HKV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr,
):  # fmt: skip
    """Which rows take each candidate: p_taken int32 [places, WORDS] (at the top [lists, room * 16, WORDS]).

    And per list p_count: candidates that any row takes; p_next_places: places of the level below (p_next_spans: those of its open
    gists), or at the bottom places of the chunks, each a gist and the raw tokens behind it. Grid: (lists,).
    """
    i_slot = tl.program_id(0)
    i_list = i_from + i_slot
    i_block = i_list // HKV
    if TOP:
        i_span, n = tl.load(p_spans + i_block * 2), tl.load(p_spans + i_block * 2 + 1)
        p_taken += i_list.to(tl.int64) * (room * ROOM_UNIT) * WORDS
    else:
        n = tl.load(p_places + i_list)
        i_begin = tl.load(p_begin + i_list)
        p_key += i_begin
        p_taken += i_begin * WORDS
    i_sample = tl.load(p_blocks + i_block * 3 + 2).to(tl.int64)
    p_child_lo += i_sample * tokens
    p_child_hi += i_sample * tokens
    o_row = tl.arange(0, BM)
    b_bound = tl.load(p_bound + i_slot * BM + o_row)
    b_last = tl.load(p_last + i_slot * BM + o_row)
    o_score = (i_slot * BM + o_row).to(tl.int64) * (room * ROOM_UNIT)
    count, places = 0, 0
    for i in range(0, n, BN):
        o_place = i + tl.arange(0, BN)
        m_place = o_place < n
        b_s = tl.load(p_score + o_score[:, None] + o_place[None, :], mask=m_place[None, :], other=LEAST)  # [BM, BN]
        m_equal = (b_s == b_bound[:, None]) & (o_place[None, :] <= b_last[:, None])
        b_taken = ((b_s > LEAST) & ((b_s > b_bound[:, None]) | m_equal)).to(tl.int32)
        for w in tl.static_range(WORDS):
            b_word = tl.where((o_row // 32 == w)[:, None], b_taken << (o_row % 32)[:, None], 0)
            tl.store(p_taken + o_place * WORDS + w, tl.reduce(b_word, 0, any_bit), mask=m_place)
        m_any = tl.max(b_taken, 0) > 0
        o_key = i_span + o_place if TOP else tl.load(p_key + o_place, mask=m_any, other=0)
        b_width = tl.load(p_child_hi + o_key, mask=m_any, other=0) - tl.load(p_child_lo + o_key, mask=m_any, other=0)
        count += tl.sum(m_any.to(tl.int32), 0)
        places += tl.sum(b_width, 0)
    places += count if BOTTOM else tl.load(p_next_spans + i_block * 2 + 1)
    tl.store(p_count + i_list, count)
    tl.store(p_next_places + i_list, places)


@triton.jit
def _query_bits(p_taken, o_place, m_place, BM: tl.constexpr, WORDS: tl.constexpr, PER: tl.constexpr):
    """Bits of the queries any of whose rows took each place: int32 [BN]; queries beyond the block's have no bits."""
    b_bits = tl.zeros([o_place.shape[0]], tl.int32)
    for w in tl.static_range(WORDS):
        b_word = tl.load(p_taken + o_place * WORDS + w, mask=m_place, other=0)
        for r in tl.static_range(32):
            if w * 32 + r < BM and (w * 32 + r) // PER < 32:
                b_bits |= ((b_word >> r) & 1) << ((w * 32 + r) // PER)
    return b_bits


@kernel
def list_kernel(
    p_taken, p_lo, p_hi, p_blocks, p_spans, p_next_spans, p_begin, p_places, p_key, p_child_lo, p_child_hi,
    p_new_first, p_new_begin, p_new_row, p_new_bits, p_new_takers, p_new_owner, p_new_place, p_new_key, p_new_words, room, tokens,
    HKV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr,
    TOP: tl.constexpr, BOTTOM: tl.constexpr,
):  # fmt: skip
    """The list of each block and KV head, from p_new_first [lists + 1] on: rows, queries as bits, their number, list, places.

    Below which there is a level, also its candidates from p_new_begin [lists + 1] on: p_new_key [places], p_new_words
    [places, WORDS]; p_lo, p_hi [N] are then the ranges of that level's open gists. Grid: (lists,).
    """
    i_list = tl.program_id(0)
    i_block = i_list // HKV
    if TOP:
        i_span, n = tl.load(p_spans + i_block * 2), tl.load(p_spans + i_block * 2 + 1)
        p_taken += i_list.to(tl.int64) * (room * ROOM_UNIT) * WORDS
    else:
        n = tl.load(p_places + i_list)
        i_begin = tl.load(p_begin + i_list)
        p_key += i_begin
        p_taken += i_begin * WORDS
    i_first = tl.load(p_blocks + i_block * 3)
    i_sample = tl.load(p_blocks + i_block * 3 + 2).to(tl.int64)
    p_child_lo += i_sample * tokens
    p_child_hi += i_sample * tokens
    i_new, i_place = tl.load(p_new_first + i_list), 0
    if not BOTTOM:
        i_to = tl.load(p_new_begin + i_list)
        p_new_key += i_to
        p_new_words += i_to * WORDS
    for i in range(0, n, BN):
        o_place = i + tl.arange(0, BN)
        m_place = o_place < n
        b_bits = _query_bits(p_taken, o_place, m_place, BM, WORDS, PER)  # [BN]
        m_any = b_bits != 0
        o_new = i_new + tl.cumsum(m_any.to(tl.int32), 0) - 1
        o_key = i_span + o_place if TOP else tl.load(p_key + o_place, mask=m_any, other=0)
        b_child = tl.load(p_child_lo + o_key, mask=m_any, other=0)
        b_width = tl.load(p_child_hi + o_key, mask=m_any, other=0) - b_child + (1 if BOTTOM else 0)
        b_width = tl.where(m_any, b_width, 0)
        o_to = i_place + tl.cumsum(b_width, 0) - b_width
        tl.store(p_new_row + o_new, o_key, mask=m_any)
        tl.store(p_new_bits + o_new, b_bits, mask=m_any)
        tl.store(p_new_takers + o_new, count_bits(b_bits), mask=m_any)
        tl.store(p_new_owner + o_new, i_list, mask=m_any)
        tl.store(p_new_place + o_new, o_to, mask=m_any)
        if not BOTTOM:
            for j in range(0, tl.max(b_width, 0)):
                m_child = j < b_width
                tl.store(p_new_key + o_to + j, b_child + j, mask=m_child)
                for w in tl.static_range(WORDS):
                    b_word = tl.load(p_taken + o_place * WORDS + w, mask=m_child, other=0)
                    tl.store(p_new_words + (o_to + j) * WORDS + w, b_word, mask=m_child)
        i_new += tl.sum(m_any.to(tl.int32), 0)
        i_place += tl.sum(b_width, 0)
    if not BOTTOM:
        o_row = tl.arange(0, BM)
        o_query = i_first + o_row // PER
        m_row = o_query < tl.load(p_blocks + i_block * 3 + 1)
        b_lo = tl.load(p_lo + o_query, mask=m_row, other=0)
        b_hi = tl.load(p_hi + o_query, mask=m_row, other=0)
        i_open, open_gists = tl.load(p_next_spans + i_block * 2), tl.load(p_next_spans + i_block * 2 + 1)
        for i in range(0, open_gists, BN):
            o_open = i + tl.arange(0, BN)
            m_open = o_open < open_gists
            b_seen = in_range((i_open + o_open)[None, :], b_lo[:, None], b_hi[:, None]).to(tl.int32)  # [BM, BN]
            tl.store(p_new_key + i_place + o_open, i_open + o_open, mask=m_open)
            for w in tl.static_range(WORDS):
                b_word = tl.where((o_row // 32 == w)[:, None], b_seen << (o_row % 32)[:, None], 0)
                tl.store(p_new_words + (i_place + o_open) * WORDS + w, tl.reduce(b_word, 0, any_bit), mask=m_open)
