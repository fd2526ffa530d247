"""A selection's lists turned round, for d_k and d_v: from keys to whatever selected them.

Every layer selects for itself, so this is done per layer; the host knows all sizes beforehand and waits for nothing.

Of each *chunk* (a level-0 gist and the raw tokens behind it) and KV head the queries that selected it are written side by side,
the blocks in order: lists of neighbouring blocks are counted together, a *tally*, then each tally's program walks through its
lists and knows where the next query of every chunk goes. Counts are added by atomics; whole numbers have one sum in every order,
so two runs are equal. The queries of a chunk that very many selected are cut into parts, a program each, whose sums are added
afterwards. Where those stand among the *slots* of partial sums follows from where their queries begin: see :func:`parts_of`.

Gists above level 0 come in *groups* of neighbours. Which blocks may have selected any of them the layout says
(kernels/unfold/plan.py); here the bits of every list are put where the rows of its gists are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from unfold.kernels.common.launch import INTERPRETED
from unfold.kernels.common.tl import kernel
from unfold.kernels.select.blocks import BlockLists
from unfold.kernels.select.kernels import count_bits
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold.plan import level_0_gists

# Chunks that many queries selected are cut into parts of at most this many, or of so many that the partial sums hold no more
# numbers than d_k and d_v.
SHORTEST_LIST = 512
TALLIES = 3 if INTERPRETED else 64
SPREAD = 2**9 if INTERPRETED else 2**26  # bits of lists for gists above level 0 at once; four bytes each
ITEMS = 256  # of one program at a time


@triton.jit
def _longest(p_end, all_groups, most, KEYS: tl.constexpr, SHORT: tl.constexpr):
    """Queries of a part at most, int64; ``most``: rows times KV heads, of which d_k has one number per dimension."""
    total = tl.load(p_end + all_groups - 1)
    return tl.maximum((2 * KEYS * total + most - 1) // most, SHORT)


@triton.jit
def parts_of(p_end, all_groups, i_group, most, KEYS: tl.constexpr, SHORT: tl.constexpr):
    """First slot of a chunk that is cut, and its parts.

    Its queries [a, b) make ceil((b - a) / longest) parts, more than one; from slot 2 * a // longest on there are as many slots up
    to that of b, since 2 * x, rounded down, is no less than x, rounded up, for x > 1.
    """
    longest = _longest(p_end, all_groups, most, KEYS, SHORT)
    i_first = tl.load(p_end + i_group - 1, mask=i_group > 0, other=0)
    n = tl.load(p_end + i_group) - i_first
    return (2 * i_first // longest).to(tl.int32), ((n + longest - 1) // longest).to(tl.int32)


@triton.jit
def work_of(p_end, all_groups, slots, most, i, KEYS: tl.constexpr, SHORT: tl.constexpr):
    """What program i does: chunk, slot or -1, first query of the list of all, number of queries; 0 where there is nothing.

    The first ``slots`` programs have a part of a chunk that is cut each, the others a chunk that is not.
    """
    longest = _longest(p_end, all_groups, most, KEYS, SHORT)
    if i < slots:
        # Of all chunks whose slots begin here or before, the last one: that of the last query before (i + 1) * longest / 2.
        i_query = ((i + 1) * longest + 1) // 2 - 1
        i_group, i_beyond = tl.minimum(i, 0), all_groups - 1
        while i_group < i_beyond:
            i_middle = (i_group + i_beyond) // 2
            m_after = tl.load(p_end + i_middle) > i_query
            i_beyond = tl.where(m_after, i_middle, i_beyond)
            i_group = tl.where(m_after, i_group, i_middle + 1)
        i_first = tl.load(p_end + i_group - 1, mask=i_group > 0, other=0)
        n = tl.load(p_end + i_group) - i_first
        i_part = i - 2 * i_first // longest
        n = tl.where((n > longest) & (i_part >= 0), tl.maximum(tl.minimum(longest, n - i_part * longest), 0), 0)
        i_first += i_part * longest
        i_slot = i
    else:
        i_group = i - slots
        i_first = tl.load(p_end + i_group - 1, mask=i_group > 0, other=0)
        n = tl.load(p_end + i_group) - i_first
        n = tl.where(n > longest, 0, n)
        i_slot = tl.minimum(i, 0) - 1
    return i_group, i_slot, i_first, n.to(tl.int32)


@triton.jit
def _level_0_list(p_first, p_count, p_blocks, p_starts, i_list, lists, batch, groups, HKV: tl.constexpr, L: tl.constexpr):
    """Of a list of level-0 gists: first item, number of items; and what to add to a row to get the chunk's number."""
    i_sample = tl.load(p_blocks + i_list // HKV * 3 + 2)
    i_owner = i_list % HKV * batch + i_sample
    i_shift = i_owner * groups - tl.load(p_starts + i_sample * (L + 3) + L - 1)
    return tl.load(p_first + (L - 1) * lists + i_list), tl.load(p_count + (L - 1) * lists + i_list), i_shift


@kernel
def tally_kernel(
    p_first, p_count, p_row, p_bits, p_blocks, p_starts, p_tally, lists, batch, groups, per,
    HKV: tl.constexpr, L: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """How many queries of ``per`` neighbouring blocks selected each chunk: adds to p_tally [tallies, HKV * B * groups] int32.

    Grid: (lists,).
    """
    i_list = tl.program_id(0)
    i_first, items, i_shift = _level_0_list(p_first, p_count, p_blocks, p_starts, i_list, lists, batch, groups, HKV, L)
    p_row += i_first
    p_bits += i_first
    p_tally += (i_list // HKV // per).to(tl.int64) * (HKV * batch * groups)
    for i in range(0, items, BN):
        o_item = i + tl.arange(0, BN)
        m_item = o_item < items
        o_chunk = tl.load(p_row + o_item, mask=m_item, other=0) + i_shift
        tl.atomic_add(p_tally + o_chunk, count_bits(tl.load(p_bits + o_item, mask=m_item, other=0)), mask=m_item)


@kernel
def fold_kernel(p_tally, p_total, items, slots, BN: tl.constexpr):
    """In each of ``slots`` tallies [slots, items] the counts of those before, of each chunk; p_total [items]: of all.

    Grid: (items / BN,).
    """
    o_chunk = tl.program_id(0) * BN + tl.arange(0, BN)
    m_chunk = o_chunk < items
    b_before = tl.zeros([BN], tl.int32)
    for _ in range(0, slots):
        b_own = tl.load(p_tally + o_chunk, mask=m_chunk, other=0)
        tl.store(p_tally + o_chunk, b_before, mask=m_chunk)
        b_before += b_own
        p_tally += items
    tl.store(p_total + o_chunk, b_before, mask=m_chunk)


@kernel
def fill_kernel(
    p_first, p_count, p_row, p_bits, p_blocks, p_starts, p_tally, p_end, p_query, lists, batch, groups, per, blocks,
    HKV: tl.constexpr, L: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The queries of every chunk, side by side: p_query, from p_end [HKV * B * groups] int64 of the chunk before on.

    p_tally: where those of the program's blocks go, from there on; counted up. Grid: (tallies, HKV).
    """
    i_begin = tl.program_id(0) * per
    p_tally += tl.program_id(0).to(tl.int64) * (HKV * batch * groups)
    for i_block in range(i_begin, tl.minimum(i_begin + per, blocks)):
        i_list = i_block * HKV + tl.program_id(1)
        i_first, items, i_shift = _level_0_list(p_first, p_count, p_blocks, p_starts, i_list, lists, batch, groups, HKV, L)
        i_query = tl.load(p_blocks + i_block * 3)
        for i in range(0, items, BN):
            o_item = i + tl.arange(0, BN)
            m_item = o_item < items
            o_chunk = tl.load(p_row + i_first + o_item, mask=m_item, other=0) + i_shift
            b_bits = tl.load(p_bits + i_first + o_item, mask=m_item, other=0)
            b_before = tl.load(p_tally + o_chunk, mask=m_item, other=0)
            o_to = tl.load(p_end + o_chunk - 1, mask=m_item & (o_chunk > 0), other=0) + b_before
            for j in tl.static_range(SIZE):
                b_bit = (b_bits >> j) & 1
                tl.store(p_query + o_to, i_query + j, mask=b_bit > 0)
                o_to += b_bit
            tl.store(p_tally + o_chunk, b_before + count_bits(b_bits), mask=m_item)
        tl.debug_barrier()  # within a list every chunk stands once; another thread may go on with it in the next


@kernel
def spread_kernel(
    p_first, p_count, p_row, p_bits, p_spread, i_from, lists, keys, HKV: tl.constexpr, L: tl.constexpr, BN: tl.constexpr
):
    """The bits of the gists above level 0 where their rows are: p_spread [lists of a slice, keys] int32, zeros.

    Grid: (lists of the blocks from i_from on, L - 1).
    """
    i_list, i_segment = i_from * HKV + tl.program_id(0), tl.program_id(1)
    i_first = tl.load(p_first + i_segment * lists + i_list)
    items = tl.load(p_count + i_segment * lists + i_list)
    p_spread += tl.program_id(0).to(tl.int64) * keys
    for i in range(0, items, BN):
        o_item = i + tl.arange(0, BN)
        o_row = tl.load(p_row + i_first + o_item, mask=o_item < items, other=0)
        b_bits = tl.load(p_bits + i_first + o_item, mask=o_item < items, other=0)
        tl.store(p_spread + o_row, b_bits, mask=o_item < items)


@dataclass(frozen=True)
class ChunkQueries:
    """Who selected each chunk: ``groups`` chunks of each KV head and sample, those that a sample lacks have no queries.

    Attributes:
        query: int32, the queries of all chunks.
        end: [HKV * B * groups] int64, where those of each end.
        groups: of the sample that has most.
        slots: of partial sums, at most.
        most: what the kernels work out the longest part from.
    """

    query: Tensor
    end: Tensor
    groups: int
    slots: int
    most: int


def chunk_queries(tree: GistTree, lists: BlockLists, keys: int) -> ChunkQueries:
    """The queries of every chunk of at most ``keys`` keys."""
    groups, batch, blocks = level_0_gists(tree), tree.others.batch, len(lists.blocks.table)
    every, number = lists.kv_heads * batch * groups, len(lists.blocks.table) * lists.kv_heads
    assert every < 2**31, f"{every} chunks in one layer; use smaller micro-batches"
    per = triton.cdiv(blocks, TALLIES)
    tallies = triton.cdiv(blocks, per)
    new = lambda n: torch.empty(n, dtype=torch.int32, device=lists.row.device)
    tally, total = torch.zeros(tallies * every, dtype=torch.int32, device=lists.row.device), new(every)
    found = lists.first, lists.count, lists.row, lists.bits, lists.blocks.table, tree.others.segment_start
    sizes = dict(HKV=lists.kv_heads, L=tree.levels, BN=ITEMS)
    tally_kernel[(number,)](*found, tally, number, batch, groups, per, **sizes)
    fold_kernel[(triton.cdiv(every, ITEMS),)](tally, total, every, tallies, BN=ITEMS)
    end, query = total.cumsum(0), new(max(1, lists.entries))
    size = lists.blocks.size
    fill_kernel[tallies, lists.kv_heads](*found, tally, end, query, number, batch, groups, per, blocks, SIZE=size, **sizes)
    most = tree.others.rows.numel() * lists.kv_heads
    slots = 1 + min(most // keys, 2 * lists.entries // SHORTEST_LIST)
    return ChunkQueries(query, end, groups, slots, most)


def spread_bits(tree: GistTree, lists: BlockLists, keys: int) -> Iterator[tuple[int, int, Tensor]]:
    """Slices of blocks, first and last + 1, with the bits of every list for each of the ``keys`` rows of gists above level 0.

    The tables, [lists of the slice, keys] int32, would grow with the square of the length: so no more at once than fit SPREAD.
    """
    blocks, heads = len(lists.blocks.table), lists.kv_heads
    step = max(1, SPREAD // (keys * heads))
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        spread = torch.zeros((last - first) * heads, keys, dtype=torch.int32, device=lists.row.device)
        spread_kernel[spread.shape[0], tree.levels - 1](
            lists.first,
            lists.count,
            lists.row,
            lists.bits,
            spread,
            first,
            blocks * heads,
            keys,
            HKV=heads,
            L=tree.levels,
            BN=ITEMS,
        )
        yield first, last, spread
