"""What the Triton kernels of unfolding share: which keys a block of queries visits, and who sees them.

Names and units are those of kernels/compressed/common.py. A tile's rows are the queries of one block times the query heads of
one KV head; row r is query ``r // G`` of the block. The keys of a block come in three kinds of tiles:

- *near*: the window and the sinks that the block's queries span, seen by range;
- *upper*: selected gists above level 0, one key each, seen by bit;
- *chunks*: selected level-0 gists, each followed by the raw tokens behind it, laid side by side; seen by bit, but for the raw
  tokens of a chunk that lies in a query's window: those count there (a chunk lies in a window entirely or not at all).

The lists behind the last two are kernels.select.blocks.BlockLists, loop bounds come from them and nowhere else.
"""

import triton
import triton.language as tl

from unfold.kernels.compressed.common import in_range


@triton.jit
def block_rows(p_blocks, i_block, i_head, queries, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    """Of a block: sample; per row: exists, query, number within the block, offset in [N, H, D], offset in [HKV, N * G]."""
    G: tl.constexpr = H // HKV
    i_first, i_last = tl.load(p_blocks + i_block * 3), tl.load(p_blocks + i_block * 3 + 1)
    o_row = tl.arange(0, BM)
    o_bit = tl.minimum(o_row // G, 31)  # beyond: no query of the block, and a shift by 32 is undefined
    m_row = o_row < (i_last - i_first) * G
    o_query = i_first + o_row // G
    o_q = o_query.to(tl.int64) * (H * D) + (i_head * G + o_row % G) * D
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
def upper_tile(p_row, p_bits, i, items, o_bit, BN: tl.constexpr):
    """Keys of the items i .. i + BN of a list of ``items``, -1 behind its end, and who sees them."""
    o_item = i + tl.arange(0, BN)
    m_item = o_item < items
    o_key = tl.load(p_row + o_item, mask=m_item, other=-1)
    return o_key, has_bit(tl.load(p_bits + o_item, mask=m_item, other=0), o_bit)


@triton.jit
def item_of_place(p_place, i_item, items, o_place, i_next, BN: tl.constexpr):
    """Which item each place of a tile lies in, and which one the next tile begins in; ``i_item`` is the tile's first.

    Every item has a place, so the BN items after the first reach over the tile's end: counting those that begin at or before a
    place is a search without dependent loads.
    """
    o_item = i_item + 1 + tl.arange(0, BN)
    b_start = tl.load(p_place + o_item, mask=o_item < items, other=2147483647)
    o_of = i_item + tl.sum((b_start[None, :] <= o_place[:, None]).to(tl.int32), 1)
    return o_of, i_item + tl.sum((b_start <= i_next).to(tl.int32), 0)


@triton.jit
def chunk_tile(p_row, p_bits, p_place, p_child_lo, i, i_item, items, places, b_lo, o_bit, BN: tl.constexpr):
    """Keys of the places i .. i + BN of a list's chunks, who sees them, and the item that the next tile begins in."""
    o_place = i + tl.arange(0, BN)
    o_item, i_next = item_of_place(p_place, i_item, items, o_place, i + BN, BN)
    m_place = o_place < places
    o_gist = tl.load(p_row + o_item, mask=m_place, other=0)
    o_within = o_place - tl.load(p_place + o_item, mask=m_place, other=0)
    o_raw = tl.load(p_child_lo + o_gist, mask=m_place, other=0) + o_within - 1
    o_key = tl.where(m_place, tl.where(o_within == 0, o_gist, o_raw), -1)
    b_bits = tl.load(p_bits + o_item, mask=m_place, other=0)
    return o_key, has_bit(b_bits, o_bit) & (o_key[None, :] < b_lo[:, None]), i_next
