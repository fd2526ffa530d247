"""The Triton kernels of selection: per row the bound that exactly its budget of candidates passes, then the lists of blocks.

A row is a query and a query head (each head selects), or a query (the heads' scores are summed: SUM of them). A block of rows has
*candidates*, which stand in places, in the order of their rows: at the top level a span of gists; below it the children of the
parents that any of its rows selected, then the span of gists whose parent is still open. Three launches go through a level:

- :func:`score_kernel` scores every candidate against every row, once, into a scratch of ordered integers;
- :func:`bound_kernel` finds each row's bound among its scores, which its program holds in registers;
- :func:`take_kernel` writes the lists of what was taken, and the candidates of the level below.

Scratch and candidates have the same room for every list, for as many lists at a time as fit a bounded memory: no program waits
for another, no key is read twice, and the host knows all sizes (kernels/select/room.py). Where scores tie at a bound, the
earlier gists are taken. A budget of any size costs the same, and the result is exact.
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
    p_blocks, p_tokens, i_block, i_head,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Of a block: sample; per row [BM]: exists, query, offset of its (first) head in q, where p_tokens says."""
    PER: tl.constexpr = H // HKV // SUM  # rows per query
    i_first, i_last = tl.load(p_blocks + i_block * 3), tl.load(p_blocks + i_block * 3 + 1)
    o_row = tl.arange(0, BM)
    m_row = o_row < (i_last - i_first) * PER
    o_query = i_first + o_row // PER
    o_q = tl.load(p_tokens + o_query, mask=m_row, other=0) * (H * D) + (i_head * (H // HKV) + o_row % PER * SUM) * D
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
    p_q, p_k, p_tokens, p_lo, p_hi, p_blocks, p_spans, p_places, p_key, p_words, p_score, i_from, room, keys,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUM: tl.constexpr, WORDS: tl.constexpr, TOP: tl.constexpr, TILES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Ordered scores [lists, BM, room * 16] int32 of the lists from i_from on; LEAST where a place is no candidate of a row.

    At the top p_spans [blocks, 2] and p_lo, p_hi [N] say what the candidates are. Below: p_places [lists], p_key
    [lists, room * 16], p_words [lists, room * 16, WORDS]: bit r of word w says that the place is a candidate of row 32 * w + r.
    p_tokens [N] int64: where the queries stand in p_q. Grid: (lists, TILES tiles of places each).
    """
    i_slot = tl.program_id(0)
    i_list = i_from + i_slot
    i_block, i_head = i_list // HKV, i_list % HKV
    if TOP:
        i_span, n = tl.load(p_spans + i_block * 2), tl.load(p_spans + i_block * 2 + 1)
    else:
        n = tl.load(p_places + i_slot)
        p_key += i_slot.to(tl.int64) * (room * ROOM_UNIT)
        p_words += i_slot.to(tl.int64) * (room * ROOM_UNIT) * WORDS
    i_first = tl.program_id(1) * (TILES * BN)
    if i_first < n:
        i_sample, m_row, o_query, o_q = block_rows(p_blocks, p_tokens, i_block, i_head, H, HKV, D, BM, SUM)
        b_q = load_tile(p_q, o_q, m_row, D, BD)  # [BM, BD]
        p_k += i_sample.to(tl.int64) * keys * (HKV * D) + i_head * D
        o_row = tl.arange(0, BM)
        o_score = (i_slot * BM + o_row).to(tl.int64) * (room * ROOM_UNIT)
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
    p_score, p_budget, p_blocks, p_spans, p_places, p_bound, i_from, room,
    HKV: tl.constexpr, BM: tl.constexpr, PER: tl.constexpr, TOP: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Per row: scores over a bound, or equal to it and in a place up to a last one, are taken; both p_bound [lists, BM, 2] int32.

    p_budget [N] by query. WHOLE: no row has more than N candidates, so that they stay in registers; else N after another.
    Grid: (lists, BM).
    """
    i_slot, i_row = tl.program_id(0), tl.program_id(1)
    i_list = i_from + i_slot
    i_block = i_list // HKV
    n = tl.load(p_spans + i_block * 2 + 1) if TOP else tl.load(p_places + i_slot)
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
    tl.store(p_bound + (i_slot * BM + i_row) * 2, bound)
    tl.store(p_bound + (i_slot * BM + i_row) * 2 + 1, i_last)


@triton.jit
def _taken(p_score, o_score, b_bound, b_last, o_place, n):
    """Which rows take the candidates in some places: int32 [BM, BN], zeros and ones."""
    b_s = tl.load(p_score + o_score[:, None] + o_place[None, :], mask=(o_place < n)[None, :], other=LEAST)
    m_equal = (b_s == b_bound[:, None]) & (o_place[None, :] <= b_last[:, None])
    return ((b_s > LEAST) & ((b_s > b_bound[:, None]) | m_equal)).to(tl.int32)


@triton.jit
def _word(b_taken, o_row, w: tl.constexpr):
    """Bits of the rows 32 * w .. of each place: int32 [BN]."""
    return tl.reduce(tl.where((o_row // 32 == w)[:, None], b_taken << (o_row % 32)[:, None], 0), 0, any_bit)


@triton.jit
def _list_open(p_key, p_words, i_open, opened, o_row, b_lo, b_hi, BN: tl.constexpr, WORDS: tl.constexpr):
    """List the ``opened`` gists from i_open on as candidates of the rows whose ranges [b_lo, b_hi) hold them."""
    for i in range(0, opened, BN):
        o_open = i + tl.arange(0, BN)
        m_open = o_open < opened
        b_seen = in_range((i_open + o_open)[None, :], b_lo[:, None], b_hi[:, None]).to(tl.int32)  # [BM, BN]
        tl.store(p_key + o_open, i_open + o_open, mask=m_open)
        for w in tl.static_range(WORDS):
            tl.store(p_words + o_open * WORDS + w, _word(b_seen, o_row, w), mask=m_open)


@triton.jit
def _add_children(p_words, o_first, b_width, b_taken, o_row, WORDS: tl.constexpr):
    """Add to the words of b_width children each, from place o_first on, the rows that took the parent; no child has two."""
    for w in tl.static_range(WORDS):
        b_word = _word(b_taken, o_row, w)
        for j in range(0, tl.max(b_width, 0)):
            m_child = j < b_width
            p_word = p_words + (o_first + j) * WORDS + w
            tl.store(p_word, tl.load(p_word, mask=m_child, other=0) | b_word, mask=m_child)


@triton.jit
def _list_children(p_key, p_words, o_to, b_child, b_width, b_taken, o_row, WORDS: tl.constexpr):
    """List b_width children each, from row b_child on, at places o_to: candidates of the rows that took the parent."""
    for j in range(0, tl.max(b_width, 0)):
        tl.store(p_key + o_to + j, b_child + j, mask=j < b_width)
    for w in tl.static_range(WORDS):
        b_word = _word(b_taken, o_row, w)
        for j in range(0, tl.max(b_width, 0)):
            tl.store(p_words + (o_to + j) * WORDS + w, b_word, mask=j < b_width)


@kernel
def take_kernel(
    p_score, p_bound, p_spans, p_next_spans, p_next_lo, p_next_hi, p_places, p_key, p_child_lo, p_child_hi, p_blocks,
    p_first, p_row, p_bits, p_count, p_new_places, p_new_key, p_new_words, i_from, room, next_room, tokens, lists,
    HKV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr,
    S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The list of each block and KV head at level segment S: rows p_row, queries as bits p_bits, from p_first [L, lists] on.

    p_count [2 * L + 2, lists] gets how many, and the sum of their bits; at the bottom the places of the chunks, a gist and the
    raw tokens behind it each. Above it the candidates of the next level: how many, p_new_places [lists of the slice]; p_new_key
    and p_new_words as in :func:`score_kernel`. p_next_lo, p_next_hi [N], p_next_spans: its open gists. Grid: (lists,).
    """
    TOP: tl.constexpr = S == 0
    BOTTOM: tl.constexpr = S == L - 1
    i_slot = tl.program_id(0)
    i_list = i_from + i_slot
    i_block = i_list // HKV
    if TOP:
        i_span, n = tl.load(p_spans + i_block * 2), tl.load(p_spans + i_block * 2 + 1)
    else:
        n = tl.load(p_places + i_slot)
        p_key += i_slot.to(tl.int64) * (room * ROOM_UNIT)
    i_query = tl.load(p_blocks + i_block * 3)
    i_sample = tl.load(p_blocks + i_block * 3 + 2).to(tl.int64)
    p_child_lo += i_sample * tokens
    p_child_hi += i_sample * tokens
    i_first = tl.load(p_first + S * lists + i_list)
    p_row += i_first
    p_bits += i_first
    o_row = tl.arange(0, BM)
    o_bit = tl.minimum(o_row // PER, 31)  # beyond: rows that no query has, which take nothing
    b_bound = tl.load(p_bound + (i_slot * BM + o_row) * 2)
    b_last = tl.load(p_bound + (i_slot * BM + o_row) * 2 + 1)
    o_score = (i_slot * BM + o_row).to(tl.int64) * (room * ROOM_UNIT)
    i_open, opened = 0, 0
    if not BOTTOM:
        i_open, opened = tl.load(p_next_spans + i_block * 2), tl.load(p_next_spans + i_block * 2 + 1)
        i_open = tl.where(opened > 0, i_open, MOST)
        p_new_key += i_slot.to(tl.int64) * (next_room * ROOM_UNIT)
        p_new_words += i_slot.to(tl.int64) * (next_room * ROOM_UNIT) * WORDS
    count, places, i_across = 0, 0, n  # i_across: from there on, children are among the open gists
    takers = tl.zeros([BN], tl.int32)
    for i in range(0, n, BN):
        o_place = i + tl.arange(0, BN)
        b_taken = _taken(p_score, o_score, b_bound, b_last, o_place, n)  # [BM, BN]
        b_bits = tl.reduce(b_taken << o_bit[:, None], 0, any_bit)  # [BN]
        m_any = b_bits != 0
        b_any = m_any.to(tl.int32)
        o_key = i_span + o_place if TOP else tl.load(p_key + o_place, mask=m_any, other=0)
        o_new = count + tl.cumsum(b_any, 0) - 1
        tl.store(p_row + o_new, o_key, mask=m_any)
        tl.store(p_bits + o_new, b_bits, mask=m_any)
        count += tl.sum(b_any, 0)
        takers += count_bits(b_bits)
        b_child = tl.load(p_child_lo + o_key, mask=m_any, other=0)
        b_end = tl.load(p_child_hi + o_key, mask=m_any, other=0)
        if BOTTOM:
            places += tl.sum(b_end - b_child + b_any, 0)
        else:
            b_width = tl.maximum(tl.minimum(b_end, i_open) - b_child, 0)
            if tl.max(b_end, 0) > i_open:
                i_across = tl.minimum(i_across, i)
            o_to = places + tl.cumsum(b_width, 0) - b_width
            _list_children(p_new_key, p_new_words, o_to, b_child, b_width, b_taken, o_row, WORDS)
            places += tl.sum(b_width, 0)
    tl.store(p_count + S * lists + i_list, count)
    tl.store(p_count + (L + 2 + S) * lists + i_list, tl.sum(takers, 0))
    if BOTTOM:
        tl.store(p_count + L * lists + i_list, places)
    else:
        tl.store(p_new_places + i_slot, places + opened)
        m_row = i_query + o_row // PER < tl.load(p_blocks + i_block * 3 + 1)
        b_lo = tl.load(p_next_lo + i_query + o_row // PER, mask=m_row, other=0)
        b_hi = tl.load(p_next_hi + i_query + o_row // PER, mask=m_row, other=0)
        _list_open(p_new_key + places, p_new_words + places * WORDS, i_open, opened, o_row, b_lo, b_hi, BN, WORDS)
        tl.debug_barrier()
        for i in range(i_across, n, BN):  # few, if any: what is open to one query is another one's child
            b_taken = _taken(p_score, o_score, b_bound, b_last, i + tl.arange(0, BN), n)
            m_any = tl.max(b_taken, 0) > 0
            o_key = i_span + i + tl.arange(0, BN) if TOP else tl.load(p_key + i + tl.arange(0, BN), mask=m_any, other=0)
            b_child = tl.maximum(tl.load(p_child_lo + o_key, mask=m_any, other=0), i_open)
            b_width = tl.load(p_child_hi + o_key, mask=m_any, other=0) - b_child
            _add_children(p_new_words + places * WORDS, b_child - i_open, b_width, b_taken, o_row, WORDS)


@kernel
def mark_kernel(
    p_first, p_count, p_row, p_blocks, p_starts, p_marks, lists, groups, HKV: tl.constexpr, L: tl.constexpr, BN: tl.constexpr
):
    """1 for every level-0 gist that stands in a list: p_marks [B, groups] int32, zeros.

    p_starts [B, L + 3]: first rows of segments. Grid: (lists,).
    """
    i_list = tl.program_id(0)
    i_sample = tl.load(p_blocks + i_list // HKV * 3 + 2)
    p_row += tl.load(p_first + (L - 1) * lists + i_list)
    items = tl.load(p_count + (L - 1) * lists + i_list)
    i_shift = i_sample * groups - tl.load(p_starts + i_sample * (L + 3) + L - 1)
    for i in range(0, items, BN):
        o_item = i + tl.arange(0, BN)
        m_item = o_item < items
        o_mark = tl.load(p_row + o_item, mask=m_item, other=0) + i_shift
        tl.atomic_max(p_marks + o_mark, m_item.to(tl.int32), mask=m_item)
