"""The GPU kernels' view of a selection: per block of neighbouring queries, what any of them selected, and who did.

Neighbouring queries select much the same gists (docs/kernels.md has the figures), so a block reads the union once, and a bit
per query says who sees what. A *list* belongs to a block and a KV head: its items are gists in the order of their rows, none
twice. How long a list is only the device knows: it has room for as many as its queries may take (kernels/select/room.py).
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
    """What the blocks selected; list ``block * Hkv + head`` of segment s has ``count[s, list]`` items from ``first[s, list]`` on.

    Attributes:
        blocks: which queries the bits stand for.
        first: [L, lists] int64; the lists of segment 0 come first, those of segment L - 1 (level 0) last.
        count: [2 * L + 2, lists] int32: items of every segment; places, where the chunks of a list lie side by side, a level-0
            gist and the raw tokens behind it each; raw tokens that the queries unfold, which the forward pass of unfolding fills
            in; bits that are set in the items of every segment.
        row: [items] int32, rows of the level-sorted buffer of the block's sample.
        bits: [items] int32, bit j for query j of the block.
        start: [lists + 1] int64, where the places of each list begin; those of a list may be fewer than there is room for.
        slices: of blocks, for as many of which at once the places are made: first, last + 1, room for places.
        entries: pairs of a query and a level-0 item with its bit, at most.
        kv_heads: Hkv.
    """

    blocks: QueryBlocks
    first: Tensor
    count: Tensor
    row: Tensor
    bits: Tensor
    start: Tensor
    slices: tuple[tuple[int, int, int], ...]
    entries: int
    kv_heads: int

    @property
    def levels(self) -> int:
        return self.first.shape[0]

    def items(self, segment: int) -> tuple[Tensor, Tensor]:
        """Of every item of a segment its list and where it stands, two [n] int64. Their number is read."""
        owner, number = expand(self.count[segment].long())
        return owner, self.first[segment][owner] + number


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
    edges, row, bits, takers = [], [], [], []
    for s in range(tree.levels):
        owner, _ = expand(selection.start[s].diff())
        query, head = owner // selection.kv_heads, owner % selection.kv_heads
        block = blocks.of_query[query]
        key = (block * selection.kv_heads + head) * rows + selection.rows[s]
        key, item = key.unique(return_inverse=True)
        bit = torch.ones_like(query) << (query - blocks.table[block, 0])
        bits.append(to_int32(torch.zeros_like(key).index_add_(0, item, bit)))
        row.append((key % rows).int())
        takers.append(torch.zeros(lists, dtype=torch.int64, device=key.device).index_add_(0, key // rows, count_bits(bits[-1])))
        edges.append(torch.searchsorted(key, torch.arange(lists + 1, device=key.device) * rows))
    places = _chunk_places(tree, blocks, edges[-1], row[-1], selection.kv_heads)
    before = [sum(map(len, row[:s])) for s in range(tree.levels)]
    first = torch.stack([edge[:-1] + n for edge, n in zip(edges, before)])
    count = torch.stack([*(edge.diff() for edge in edges), places, torch.zeros_like(places), *takers]).int()
    start = torch.nn.functional.pad(places.cumsum(0), (1, 0))
    slices = ((0, len(blocks.table), int(start[-1])),)
    entries = int(takers[-1].sum())
    return BlockLists(blocks, first, count, torch.cat(row), torch.cat(bits), start, slices, entries, selection.kv_heads)


def _chunk_places(tree: GistTree, blocks: QueryBlocks, edges: Tensor, row: Tensor, kv_heads: int) -> Tensor:
    """[lists] int64, places of the chunks of each list; edges: [lists + 1], where the lists of level-0 gists ``row`` begin."""
    owner, _ = expand(edges.diff())
    at = blocks.table[owner // kv_heads, 2].long() * tree.others.tokens + row
    width = 1 + tree.child_hi.flatten()[at] - tree.child_lo.flatten()[at]
    return torch.nn.functional.pad(width.cumsum(0), (1, 0))[edges].diff()


def selection_of(tree: GistTree, lists: BlockLists) -> Selection:
    """The same as lists of every query and KV head."""
    starts, rows = [], []
    for s in range(tree.levels):
        owner, at = lists.items(s)
        block, head = owner // lists.kv_heads, owner % lists.kv_heads
        member = (lists.bits[at, None] >> torch.arange(lists.blocks.size, device=at.device)) & 1  # [items, size]
        item, query = member.nonzero().unbind(1)
        owner = (lists.blocks.table[block, 0][item] + query) * lists.kv_heads + head[item]
        order = owner.argsort(stable=True)  # the items of a list ascend, so those of a query do
        rows.append(lists.row[at][item[order]])
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
