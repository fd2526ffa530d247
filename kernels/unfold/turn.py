"""A selection's lists turned round, for d_k and d_v: from keys to whatever selected them.

Every layer selects for itself, so this is done per layer. Keys come in *groups*: ``width`` neighbouring gists above level 0, or
one chunk (a level-0 gist and the raw tokens behind it). A group of the first kind has *visits* (a block of queries that selected
any of its gists), one of the second kind has queries; either list is cut into *parts*, a program each. One stable sort puts the
items of all lists in the order of their groups; four small kernels make the tables. No atomics, the same order in every run, and
one synchronisation, for the lengths of the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from unfold.kernels.common.tl import kernel
from unfold.kernels.select.blocks import BlockLists
from unfold.kernels.tree import GistTree

# A group that many blocks visit, or a chunk that many queries selected, is cut into parts of at most this many visits or queries,
# or of so many that the partial sums hold no more numbers than d_k and d_v.
SHORTEST_PART = 64
SHORTEST_LIST = 512
ITEMS = 256  # of one program
PART = 6  # columns of a part
SUM = 5  # columns of a group with partial sums


@dataclass(frozen=True)
class Parts:
    """Groups of keys and what each gets its d_k and d_v from.

    Attributes:
        table: [n, 6] int32: sample, KV head, first key row, first entry of its list, last + 1, slot of the partial sum or -1
            (then the part is all of its group). Parts of groups that are cut, the longest, come first.
        sums: [k, 5] int32, groups with partial sums: sample, KV head, first key row, first slot, number of slots.
        slots: number of partial sums.
    """

    table: Tensor
    sums: Tensor
    slots: int


@dataclass(frozen=True)
class Visits:
    """Groups of gists above level 0 and the blocks that visit them.

    Attributes:
        parts: with lists of visits.
        visits: [m, 3] int32: block, first item, last + 1.
        row, bits: the items in the order of the visits.
    """

    parts: Parts
    visits: Tensor
    row: Tensor
    bits: Tensor


@dataclass(frozen=True)
class ChunkItems:
    """Chunks and the queries that selected them, as items of (block, bits).

    Attributes:
        parts: with lists of queries.
        bits, block: [items] int32, by chunk, then by block.
        end: [items] int64, where the queries of each item end in the list of all.
        queries: its length.
    """

    parts: Parts
    bits: Tensor
    block: Tensor
    end: Tensor
    queries: int


@kernel
def group_kernel(
    p_list, p_row, p_blocks, p_group, items, bottom, above, batch, per_upper, per_chunk,
    HKV: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The group of every item: those above level 0 (the first ``bottom`` items) have numbers below ``above``.

    A group is (KV head, sample, row // width); per_upper, per_chunk: of one sample and KV head. Grid: (items / BN,).
    """
    o_item = tl.program_id(0) * BN + tl.arange(0, BN)
    m_item = o_item < items
    o_list = tl.load(p_list + o_item, mask=m_item, other=0)
    i_sample = tl.load(p_blocks + o_list // HKV * 3 + 2, mask=m_item, other=0)
    o_row = tl.load(p_row + o_item, mask=m_item, other=0)
    o_owner = o_list % HKV * batch + i_sample
    o_group = tl.where(o_item < bottom, o_owner * per_upper + o_row // WIDTH, above + o_owner * per_chunk + o_row)
    tl.store(p_group + o_item, o_group, mask=m_item)


@kernel
def sorted_kernel(
    p_order, p_group, p_list, p_row, p_bits, p_takers, p_new_block, p_new_row, p_new_bits, p_count, items, bottom,
    HKV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Block, row and bits of the items in the order of their groups, and what each adds to its group's list.

    That is a visit, where an item is the first of its block in its group, or below ``bottom`` its queries. Grid: (items / BN,).
    """
    o_item = tl.program_id(0) * BN + tl.arange(0, BN)
    m_item = o_item < items
    m_before = m_item & (o_item > 0)
    o_from = tl.load(p_order + o_item, mask=m_item, other=0)
    o_before = tl.load(p_order + o_item - 1, mask=m_before, other=0)
    i_block = tl.load(p_list + o_from, mask=m_item, other=0) // HKV
    i_block_before = tl.load(p_list + o_before, mask=m_before, other=-HKV) // HKV
    i_group = tl.load(p_group + o_item, mask=m_item, other=0)
    i_group_before = tl.load(p_group + o_item - 1, mask=m_before, other=-1)
    m_new = (o_item == 0) | (i_block != i_block_before) | (i_group != i_group_before)
    b_count = tl.where(o_item < bottom, m_new.to(tl.int32), tl.load(p_takers + o_from, mask=m_item, other=0))
    tl.store(p_new_block + o_item, i_block, mask=m_item)
    tl.store(p_new_row + o_item, tl.load(p_row + o_from, mask=m_item, other=0), mask=m_item)
    tl.store(p_new_bits + o_item, tl.load(p_bits + o_from, mask=m_item, other=0), mask=m_item)
    tl.store(p_count + o_item, b_count, mask=m_item)


@triton.jit
def _list_of(p_end, p_last, o_group, m_group, above, bottom):
    """Where the lists of groups begin and end, counted from the first of their kind, and whether they are of chunks.

    p_end [items] int64: running counts; p_last [groups]: items up to and including each group's.
    """
    m_chunk = o_group >= above
    o_last = tl.load(p_last + o_group, mask=m_group, other=0)
    o_first = tl.load(p_last + o_group - 1, mask=m_group & (o_group > 0), other=0)
    i_end = tl.load(p_end + o_last - 1, mask=m_group & (o_last > 0), other=0)
    i_start = tl.load(p_end + o_first - 1, mask=m_group & (o_first > 0), other=0)
    i_visits = tl.load(p_end + bottom - 1, mask=bottom > 0, other=0)
    i_base = tl.where(m_chunk, i_visits, 0)
    return i_start - i_base, i_end - i_base, m_chunk


@triton.jit
def _longest(p_end, m_chunk, items, bottom, most, SHORT_PART: tl.constexpr, SHORT_LIST: tl.constexpr,
             WIDTH: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Longest part of a list; ``most``: rows times KV heads, of which d_k has one number per dimension."""
    i_visits = tl.load(p_end + bottom - 1, mask=bottom > 0, other=0)
    i_queries = tl.load(p_end + items - 1, mask=items > 0, other=0) - i_visits
    upper = tl.maximum((i_visits * WIDTH + most - 1) // most, SHORT_PART)
    chunk = tl.maximum((i_queries * KEYS + most - 1) // most, SHORT_LIST)
    return tl.where(m_chunk, chunk, upper)


@kernel
def part_count_kernel(
    p_end, p_last, p_counts, groups, above, items, bottom, most,
    SHORT_PART: tl.constexpr, SHORT_LIST: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Per group: parts, partial sums, whether there are any: p_counts [3, groups] int32. Grid: (groups / BN,)."""
    o_group = tl.program_id(0) * BN + tl.arange(0, BN)
    m_group = o_group < groups
    i_start, i_end, m_chunk = _list_of(p_end, p_last, o_group, m_group, above, bottom)
    longest = _longest(p_end, m_chunk, items, bottom, most, SHORT_PART, SHORT_LIST, WIDTH, KEYS)
    b_parts = ((i_end - i_start + longest - 1) // longest).to(tl.int32)
    m_cut = b_parts > 1
    tl.store(p_counts + o_group, b_parts, mask=m_group)
    tl.store(p_counts + groups + o_group, tl.where(m_cut, b_parts, 0), mask=m_group)
    tl.store(p_counts + 2 * groups + o_group, m_cut.to(tl.int32), mask=m_group)


@triton.jit
def _store_five(p_x, b_0, b_1, b_2, b_3, b_4, m_x):
    tl.store(p_x, b_0, mask=m_x)
    tl.store(p_x + 1, b_1, mask=m_x)
    tl.store(p_x + 2, b_2, mask=m_x)
    tl.store(p_x + 3, b_3.to(tl.int32), mask=m_x)
    tl.store(p_x + 4, b_4.to(tl.int32), mask=m_x)


@kernel
def part_kernel(
    p_end, p_last, p_running, p_upper, p_upper_sums, p_chunk, p_chunk_sums, groups, above, items, bottom, most, batch,
    per_upper, per_chunk,
    SHORT_PART: tl.constexpr, SHORT_LIST: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The parts [n, 6] of both kinds and the groups with partial sums [k, 5]. p_running [3, groups] int64: of the counts.

    Grid: (groups / BN,).
    """
    o_group = tl.program_id(0) * BN + tl.arange(0, BN)
    m_group = o_group < groups
    i_start, i_end, m_chunk = _list_of(p_end, p_last, o_group, m_group, above, bottom)
    longest = _longest(p_end, m_chunk, items, bottom, most, SHORT_PART, SHORT_LIST, WIDTH, KEYS)
    b_parts = (i_end - i_start + longest - 1) // longest
    m_cut = b_parts > 1

    o_own = tl.where(m_chunk, o_group - above, o_group)
    per = tl.where(m_chunk, per_chunk, per_upper)
    i_sample, i_head = o_own // per % batch, o_own // per // batch
    i_row = tl.where(m_chunk, o_own % per, o_own % per * WIDTH)

    # Running counts before the group, from the first of its kind; parts of groups that are cut come before all others.
    i_before = tl.load(p_running + o_group - 1, mask=m_group & (o_group > 0), other=0)
    i_slot = tl.load(p_running + groups + o_group - 1, mask=m_group & (o_group > 0), other=0)
    i_sum = tl.load(p_running + 2 * groups + o_group - 1, mask=m_group & (o_group > 0), other=0)
    i_before -= tl.where(m_chunk, tl.load(p_running + above - 1), 0)
    slots_above = tl.load(p_running + groups + above - 1)
    i_slot -= tl.where(m_chunk, slots_above, 0)
    i_sum -= tl.where(m_chunk, tl.load(p_running + 2 * groups + above - 1), 0)
    slots = tl.where(m_chunk, tl.load(p_running + 2 * groups - 1) - slots_above, slots_above)
    i_first = tl.where(m_cut, i_slot, slots + i_before - i_slot)

    for j in range(0, tl.max(tl.where(m_group, b_parts, 0), 0)):
        m_part = m_group & (j < b_parts)
        b_first = i_start + j * longest
        b_last = tl.minimum(b_first + longest, i_end)
        p_part = tl.where(m_chunk, p_chunk, p_upper) + (i_first + j) * 6
        _store_five(p_part, i_sample, i_head, i_row, b_first, b_last, m_part)
        tl.store(p_part + 5, tl.where(m_cut, i_slot + j, -1).to(tl.int32), mask=m_part)
    p_sum = tl.where(m_chunk, p_chunk_sums, p_upper_sums) + i_sum * 5
    _store_five(p_sum, i_sample, i_head, i_row, i_slot, b_parts, m_group & m_cut)


@kernel
def visit_kernel(p_end, p_block, p_visits, bottom, BN: tl.constexpr):
    """Visits [m, 3]: block, first item, last + 1. p_end, p_block [bottom]. Grid: (bottom / BN,)."""
    o_item = tl.program_id(0) * BN + tl.arange(0, BN)
    m_item = o_item < bottom
    i_end = tl.load(p_end + o_item, mask=m_item, other=0)
    i_before = tl.load(p_end + o_item - 1, mask=m_item & (o_item > 0), other=0)
    m_first = m_item & (i_end > i_before)
    i_after = tl.load(p_end + o_item + 1, mask=o_item + 1 < bottom, other=-1)
    o_visit = (i_end - 1) * 3
    tl.store(p_visits + o_visit, tl.load(p_block + o_item, mask=m_first, other=0), mask=m_first)
    tl.store(p_visits + o_visit + 1, o_item, mask=m_first)
    tl.store(p_visits + o_visit + 2, o_item + 1, mask=m_item & (i_after != i_end))


def turned_lists(tree: GistTree, lists: BlockLists, chunk_keys: int, upper_keys: int) -> tuple[ChunkItems, Visits]:
    """What each chunk of at most ``chunk_keys`` keys and each group of ``upper_keys`` gists above level 0 is selected by."""
    items, bottom = sum(lists.sizes), sum(lists.sizes[:-1])
    batch, owners = tree.others.batch, lists.kv_heads * tree.others.batch
    per_chunk = _gist_rows(tree)
    per_upper = triton.cdiv(per_chunk, upper_keys)
    above, groups = owners * per_upper, owners * (per_upper + per_chunk)
    assert groups < 2**31, f"{groups} groups of keys in one layer; use smaller micro-batches"
    most = tree.others.rows.numel() * lists.kv_heads
    new = lambda *shape: lists.row.new_empty(shape)
    over = lambda n: (max(1, triton.cdiv(n, ITEMS)),)
    group = new(items)
    numbers = dict(HKV=lists.kv_heads, BN=ITEMS)
    group_kernel[over(items)](
        lists.owner, lists.row, lists.blocks.table, group, items, bottom, above, batch, per_upper, per_chunk, WIDTH=upper_keys,
        **numbers,
    )  # fmt: skip
    group, order = group.sort(stable=True)
    block, row, bits, count = new(4, items)
    sorted_kernel[over(items)](
        order, group, lists.owner, lists.row, lists.bits, lists.takers, block, row, bits, count, items, bottom, **numbers
    )
    end = count.cumsum(0)
    last = torch.searchsorted(group, torch.arange(groups, dtype=torch.int32, device=group.device), right=True)
    counts = new(3, groups)
    cut = dict(SHORT_PART=SHORTEST_PART, SHORT_LIST=SHORTEST_LIST, WIDTH=upper_keys, KEYS=chunk_keys, BN=ITEMS)
    part_count_kernel[over(groups)](end, last, counts, groups, above, items, bottom, most, **cut)
    running = counts.cumsum(1)
    edge = max(bottom, 1) - 1
    known = torch.cat([running[:, [above - 1, -1]].flatten(), end[[edge, -1]]]) if items else running.new_zeros(8)
    parts_above, parts, slots_above, slots, sums_above, sums, visits, total = known.tolist()
    visits = visits if bottom else 0
    queries = total - visits
    # Tables hold int32: at recall on every one of 512k tokens a layer's selections are more.
    assert total < 2**31, f"{queries} selections of chunks, {visits} visits in one layer; use smaller micro-batches"
    upper_table, chunk_table = new(parts_above, PART), new(parts - parts_above, PART)
    upper_sums, chunk_sums = new(sums_above, SUM), new(sums - sums_above, SUM)
    part_kernel[over(groups)](
        end, last, running, upper_table, upper_sums, chunk_table, chunk_sums, groups, above, items, bottom, most, batch,
        per_upper, per_chunk, **cut,
    )  # fmt: skip
    table = new(visits, 3)
    visit_kernel[over(bottom)](end, block, table, bottom, BN=ITEMS)
    own = slice(bottom, None)
    chunks = ChunkItems(
        Parts(chunk_table, chunk_sums, slots - slots_above), bits[own], block[own], end[own] - visits, queries
    )  # fmt: skip
    return chunks, Visits(Parts(upper_table, upper_sums, slots_above), table, row[:bottom], bits[:bottom])


def _gist_rows(tree: GistTree) -> int:
    """Rows that all gists of a sample stand in, at least one (memoised)."""
    return tree.planned("gist rows", lambda whole: max(1, int(whole.others.segment_start[:, whole.levels].amax())))
