"""The GPU kernels' view of a selection: per block of neighbouring queries, what any of them selected, and who did.

Neighbouring queries select much the same gists (docs/kernels.md has the figures), so a block reads the union once, and a bit
per query says who sees what. A *list* belongs to a block and a KV head: its items are gists in the order of their rows; the
same gist stands twice at most (once as the child of a selected parent, once as one whose parent was still open), with bits of
different queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.compressed.plan import expand
from unfold.kernels.select.selection import Selection
from unfold.kernels.tree import GistTree

BITS = 32  # queries of a block at most: one int32 of bits
# Queries whose windows are further apart than this share no block: it would visit all that lies between them.
GAP = 64


@dataclass(frozen=True)
class QueryBlocks:
    """The recalling queries in blocks of neighbours, none of two samples.

    Attributes:
        table: [blocks, 3] int32: first query, last + 1, sample.
        of_query: [N] int64, the block of each query.
        size: queries per block at most.
    """

    table: Tensor
    of_query: Tensor
    size: int


@dataclass(frozen=True)
class BlockLists:
    """What the blocks selected; list ``block * Hkv + head`` of segment s has the items ``first[s, list] .. first[s, list + 1]``.

    Attributes:
        blocks: which queries the bits stand for.
        first: [L, lists + 1] int64; the lists of segment 0 come first, those of segment L - 1 (level 0) last.
        row: [items] int32, rows of the level-sorted buffer of the block's sample.
        bits: [items] int32, bit j for query j of the block.
        takers: [items] int32, how many bits are set.
        owner: [items] int32, the list of each item.
        place: [items] int32, where the chunks of a list lie side by side, a level-0 gist and the raw tokens behind it each: the
            first place of every level-0 item. Means nothing for items above.
        start: [lists + 1] int64, how many places the lists before one have: their sum at the end.
        places: that sum.
        sizes: items of each segment.
        kv_heads: Hkv.
    """

    blocks: QueryBlocks
    first: Tensor
    row: Tensor
    bits: Tensor
    takers: Tensor
    owner: Tensor
    place: Tensor
    start: Tensor
    places: int
    sizes: tuple[int, ...]
    kv_heads: int

    def items(self, segment: int) -> slice:
        """The items of a segment."""
        first = sum(self.sizes[:segment])
        return slice(first, first + self.sizes[segment])

    def owners(self) -> tuple[Tensor, Tensor, Tensor]:
        """Segment, block and KV head of every item: three [items] int64."""
        segment, _ = expand(torch.tensor(self.sizes, device=self.owner.device), sum(self.sizes))
        return segment, self.owner.long() // self.kv_heads, self.owner.long() % self.kv_heads


def query_blocks(tree: GistTree, size: int) -> QueryBlocks:
    """The (memoised) blocks of at most ``size`` queries. Their number is read."""
    assert 1 <= size <= BITS
    return tree.planned(("query blocks of recall", size), lambda whole: _query_blocks(whole, size))


def _query_blocks(tree: GistTree, size: int) -> QueryBlocks:
    device, window = tree.tokens.device, tree.levels
    sample = tree.tokens // tree.others.tokens
    apart = torch.ones(tree.queries, dtype=torch.bool, device=device)
    apart[1:] = (sample[1:] != sample[:-1]) | (tree.lo[window, 1:] > tree.hi[window, :-1] + GAP)
    index = torch.arange(tree.queries, device=device)
    begins = (index - index.where(apart, 0).cummax(0).values) % size == 0
    first = begins.nonzero()[:, 0]
    end = torch.cat([first[1:], torch.full_like(first[:1], tree.queries)])
    table = torch.stack([first, end, sample[first]], 1).int().contiguous()
    return QueryBlocks(table, begins.cumsum(0) - 1, size)


def block_lists(tree: GistTree, selection: Selection, size: int) -> BlockLists:
    """The lists of a selection made by any backend: sorts its entries."""
    blocks = query_blocks(tree, size)
    lists, rows = len(blocks.table) * selection.kv_heads, tree.others.tokens
    firsts, row, bits, owners = [], [], [], []
    for s in range(tree.levels):
        owner, _ = expand(selection.start[s].diff())
        query, head = owner // selection.kv_heads, owner % selection.kv_heads
        block = blocks.of_query[query]
        key = (block * selection.kv_heads + head) * rows + selection.rows[s]
        key, item = key.unique(return_inverse=True)
        bit = torch.ones_like(query) << (query - blocks.table[block, 0])
        bits.append(to_int32(torch.zeros_like(key).index_add_(0, item, bit)))
        row.append((key % rows).int())
        owners.append((key // rows).int())
        edges = torch.arange(lists + 1, device=key.device) * rows
        firsts.append(torch.searchsorted(key, edges) + sum(len(r) for r in row[:-1]))
    place, start = _chunk_places(tree, blocks, firsts[-1], torch.cat(row), selection.kv_heads)
    sizes, first, row, bits = tuple(map(len, row)), torch.stack(firsts), torch.cat(row), torch.cat(bits)
    takers = count_bits(bits).int()
    owner = torch.cat(owners)
    return BlockLists(blocks, first, row, bits, takers, owner, place, start, int(start[-1]), sizes, selection.kv_heads)


def _chunk_places(tree: GistTree, blocks: QueryBlocks, first: Tensor, row: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """``place`` and ``start`` of :class:`BlockLists`; first: [lists + 1] of level 0, whose items are the last of ``row``."""
    counts = first.diff()
    gists = row[len(row) - int(counts.sum()) :]
    at = blocks.table[expand(counts)[0] // kv_heads, 2].long() * tree.others.tokens + gists
    width = 1 + tree.child_hi.flatten()[at] - tree.child_lo.flatten()[at]
    after = torch.nn.functional.pad(width.cumsum(0), (1, 0))
    edges = after[first - first[0]]
    place = torch.zeros_like(row)
    place[len(row) - len(gists) :] = (after[:-1] - edges[:-1].repeat_interleave(counts)).int()
    return place, edges


def selection_of(tree: GistTree, lists: BlockLists) -> Selection:
    """The same as lists of every query and KV head."""
    segment, block, head = lists.owners()
    first = lists.blocks.table[block, 0]
    starts, rows = [], []
    for s in range(tree.levels):
        items = lists.items(s)
        member = (lists.bits[items, None] >> torch.arange(lists.blocks.size, device=lists.row.device)) & 1  # [items, size]
        item, query = member.nonzero().unbind(1)
        owner = (first[items][item] + query) * lists.kv_heads + head[items][item]
        order = owner.argsort(stable=True)  # the items of a list ascend, so those of a query do
        rows.append(lists.row[items][item[order]])
        counts = torch.bincount(owner, minlength=tree.queries * lists.kv_heads)
        starts.append(torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    return Selection(tuple(rows), tuple(starts), lists.kv_heads)


def to_int32(bits: Tensor) -> Tensor:
    """int64 in [0, 2^32) -> the int32 of the same bits."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).int()


def count_bits(bits: Tensor) -> Tensor:
    """Bits set in each int32, int64."""
    x = bits.long() & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) & 0xFFFFFFFF) >> 24
