"""What the Triton kernels of unfolding share: which keys a block of queries visits, and who sees them.

Names and units are those of kernels/common/tl.py. A tile's rows are the queries of one block times the query heads of
one KV head; row r is query ``r // G`` of the block. The keys of a block come in three kinds of tiles:

- *near*: the window and the sinks that the block's queries span, seen by range;
- *upper*: selected gists above level 0, one key each, seen by bit;
- *chunks*: selected level-0 gists, each followed by the raw tokens behind it, laid side by side; seen by bit.
  :func:`place_kernel` writes key and bits of every such place beforehand: a table that lives for one pass, so that no kernel
  searches which chunk a place lies in, and the next keys are known while the last ones are multiplied.

The lists behind the last two are kernels.select.blocks.BlockLists, loop bounds come from them and nowhere else.
"""

import triton
import triton.language as tl

from unfold.kernels.common.tl import in_range, kernel
from unfold.kernels.select.kernels import any_bit, count_bits


@triton.jit
def block_rows(
    p_blocks, p_tokens, i_block, i_head, queries, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Of a block: sample; per row: exists, query, number within the block, offset in [.., H, D], offset in [HKV, N * G].

    p_tokens [N] int64 says where the queries stand in [.., H, D].
    """
    G: tl.constexpr = H // HKV
    i_first, i_last = tl.load(p_blocks + i_block * 3), tl.load(p_blocks + i_block * 3 + 1)
    o_row = tl.arange(0, BM)
    o_bit = tl.minimum(o_row // G, 31)  # beyond: no query of the block, and a shift by 32 is undefined
    m_row = o_row < (i_last - i_first) * G
    o_query = i_first + o_row // G
    o_q = tl.load(p_tokens + o_query, mask=m_row, other=0) * (H * D) + (i_head * G + o_row % G) * D
    o_stat = (i_head.to(tl.int64) * queries + i_first) * G + o_row
    return tl.load(p_blocks + i_block * 3 + 2), m_row, o_query, o_bit, o_q, o_stat


@triton.jit
def near_spans(p_lo, p_hi, o_query, m_row, queries, L: tl.constexpr):
    """Ranges of window and sinks of every row, and the rows that they span: (window lo, hi, sinks lo, hi), (first, n) twice."""
    b_lo = tl.load(p_lo + L * queries + o_query, mask=m_row, other=0)
    b_hi = tl.load(p_hi + L * queries + o_query, mask=m_row, other=0)
    b_slo = tl.load(p_lo + (L + 1) * queries + o_query, mask=m_row, other=0)
    b_shi = tl.load(p_hi + (L + 1) * queries + o_query, mask=m_row, other=0)
    i_window = tl.min(tl.where(b_hi > b_lo, b_lo, 2147483647), 0)
    i_sinks = tl.min(tl.where(b_shi > b_slo, b_slo, 2147483647), 0)
    window = tl.maximum(tl.max(tl.where(b_hi > b_lo, b_hi, 0), 0) - i_window, 0)
    sinks = tl.maximum(tl.max(tl.where(b_shi > b_slo, b_shi, 0), 0) - i_sinks, 0)
    return b_lo, b_hi, b_slo, b_shi, i_window, window, i_sinks, sinks


@triton.jit
def near_tile(i, b_lo, b_hi, b_slo, b_shi, i_window, window, i_sinks, sinks, BN: tl.constexpr):
    """Keys of the places i .. i + BN of window and sinks side by side, -1 behind their end; bool [rows, keys], who sees them."""
    o_place = i + tl.arange(0, BN)
    o_key = tl.where(o_place < window, i_window + o_place, i_sinks + o_place - window)
    o_key = tl.where(o_place < window + sinks, o_key, -1)
    m_seen = in_range(o_key[None, :], b_lo[:, None], b_hi[:, None])
    return o_key, m_seen | in_range(o_key[None, :], b_slo[:, None], b_shi[:, None])


@triton.jit
def has_bit(b_bits, o_bit):
    """bool [rows, keys]: the row's bit is set in the key's bits."""
    return ((b_bits[None, :] >> o_bit[:, None]) & 1) != 0


@triton.jit
def listed_tile(p_key, p_bits, i, n, o_bit, BN: tl.constexpr):
    """Keys of the entries i .. i + BN of a list of ``n``, -1 behind its end, and who sees them: bool [rows, keys]."""
    o_item = i + tl.arange(0, BN)
    m_item = o_item < n
    o_key = tl.load(p_key + o_item, mask=m_item, other=-1)
    return o_key, has_bit(tl.load(p_bits + o_item, mask=m_item, other=0), o_bit)


@kernel
def place_kernel(
    p_first, p_count, p_start, p_row, p_bits, p_lo, p_blocks, p_child_lo, p_child_hi, p_key, p_seen,
    i_from, queries, tokens, lists,
    HKV: tl.constexpr, L: tl.constexpr, SIZE: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Key and bits of every place of the chunks: p_key, p_seen [places] int32; per list how many raw tokens its queries unfold.

    The raw tokens of a chunk that lies in a query's window count there: they lose that query's bit. A chunk lies in a window
    entirely or not at all, and in none if it stands apart, behind all rows of the samples. p_first, p_count, p_start: of
    kernels.select.blocks.BlockLists; p_lo: where the windows begin.
    Grid: (lists of the blocks from i_from on,).
    """
    i_base = i_from * HKV
    i_list = i_base + tl.program_id(0)
    i_block = i_list // HKV
    i_query, i_end = tl.load(p_blocks + i_block * 3), tl.load(p_blocks + i_block * 3 + 1)
    i_sample = tl.load(p_blocks + i_block * 3 + 2).to(tl.int64)
    p_child_lo += i_sample * tokens
    p_child_hi += i_sample * tokens
    p_lo += L * queries
    o_bit = tl.arange(0, BQ)
    b_window = tl.load(p_lo + i_query + o_bit, mask=i_query + o_bit < i_end, other=2147483647)  # [BQ]
    i_window = tl.min(b_window, 0)
    i_first = tl.load(p_first + (L - 1) * lists + i_list)
    p_row += i_first
    p_bits += i_first
    items = tl.load(p_count + (L - 1) * lists + i_list)
    i_start = tl.load(p_start + i_list) - tl.load(p_start + i_base)
    p_key += i_start
    p_seen += i_start
    unfolded = tl.zeros([BN], tl.int32)
    places = 0
    for i in range(0, items, BN):
        o_item = i + tl.arange(0, BN)
        m_item = o_item < items
        o_gist = tl.load(p_row + o_item, mask=m_item, other=0)
        b_bits = tl.load(p_bits + o_item, mask=m_item, other=0)
        b_child = tl.load(p_child_lo + o_gist, mask=m_item, other=0)
        b_width = tl.load(p_child_hi + o_gist, mask=m_item, other=0) - b_child
        b_taken = b_width + m_item.to(tl.int32)
        o_place = places + tl.cumsum(b_taken, 0) - b_taken
        tl.store(p_key + o_place, o_gist, mask=m_item)
        tl.store(p_seen + o_place, b_bits, mask=m_item)
        b_near = tl.where(b_child < tokens, b_child, -1)
        if tl.max(b_near, 0) >= i_window:  # few lists reach into a window
            m_within = (b_near[:, None] >= b_window[None, :]) & (o_bit < SIZE)[None, :]  # [BN, BQ]
            b_bits &= ~tl.reduce(m_within.to(tl.int32) << o_bit[None, :], 1, any_bit)
        unfolded += count_bits(b_bits) * b_width
        for j in range(0, tl.max(b_width, 0)):
            m_child = j < b_width
            tl.store(p_key + o_place + 1 + j, b_child + j, mask=m_child)
            tl.store(p_seen + o_place + 1 + j, b_bits, mask=m_child)
        places += tl.sum(b_taken, 0)
    tl.store(p_count + (L + 1) * lists + i_list, tl.sum(unfolded, 0))
