"""What the Triton kernels of unfolding work through, by vectorised tensor operations.

Per layer, since every layer selects for itself: for d_k and d_v the lists of a selection turned round, from chunks to the queries
that selected them (:func:`chunk_items`), from groups of gists above level 0 to the blocks that visit them
(:func:`group_visits`), each by one stable sort: no atomics, the same order in every run. Per micro-batch: the keys of
windows and sinks against the queries that see them (:func:`near_items`), in the tables of compressed attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.compressed.plan import SHORTEST_SPLIT, SPLITS, KeyItems, TokenSearch, expand, key_items
from unfold.kernels.intervals import Intervals
from unfold.kernels.select.blocks import BlockLists, count_bits
from unfold.kernels.tree import GistTree

# A group of keys that many blocks visit, or a chunk that many queries selected, is split into parts of at most this many visits
# or queries, or of so many that the partial sums hold no more numbers than d_k and d_v.
SHORTEST_PART = 64
SHORTEST_LIST = 512


@dataclass(frozen=True)
class Parts:
    """Groups of keys and what each gets its d_k and d_v from.

    Attributes:
        table: [n, 6] int32: sample, KV head, first key row, first entry of its list, last + 1, slot of the partial sum or -1
            (then the part is all of its group). The longest come first.
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


def longest_chunk(tree: GistTree) -> int:
    """Most raw tokens behind a level-0 gist (memoised: one sync per micro-batch)."""
    row = torch.arange(tree.others.tokens, device=tree.tokens.device)
    start = tree.others.segment_start[:, tree.levels - 1 : tree.levels + 1]
    of_level_0 = (row >= start[:, :1]) & (row < start[:, 1:])
    return tree.others.memo("longest chunk", lambda: int(((tree.child_hi - tree.child_lo) * of_level_0).amax()))


def group_visits(tree: GistTree, lists: BlockLists, width: int) -> Visits:
    """The lists turned round: of groups of ``width`` neighbouring gists above level 0."""
    items = slice(0, int(lists.first[-1, 0]))
    row, bits = lists.row[items], lists.bits[items]
    group, order, block = _by_group(tree, lists, items, row // width * width)
    new_group = _begins(group)
    new_visit = new_group | _begins(block)
    item = new_visit.nonzero()[:, 0]
    visits = torch.stack([block[item], item, _ends(item, len(group))], 1)
    of_group = new_group[item].nonzero()[:, 0]  # first visit of each group
    about = _about(tree, group[item[of_group]])
    parts = _split(about, of_group, _ends(of_group, len(item)), _longest(tree, lists, SHORTEST_PART, len(item) * width))
    return Visits(parts, visits.int().contiguous(), row[order].contiguous(), bits[order].contiguous())


def chunk_items(tree: GistTree, lists: BlockLists, width: int) -> ChunkItems:
    """The lists turned round: of level-0 gists with the raw tokens behind them, at most ``width`` keys."""
    items = slice(int(lists.first[-1, 0]), None)
    group, order, block = _by_group(tree, lists, items, lists.row[items])
    bits = lists.bits[items][order]
    end = count_bits(bits).cumsum(0)
    item = _begins(group).nonzero()[:, 0]
    start = torch.nn.functional.pad(end, (1, 0))
    queries = int(start[-1])
    longest = _longest(tree, lists, SHORTEST_LIST, queries * width)
    parts = _split(_about(tree, group[item]), start[item], start[_ends(item, len(group))], longest)
    return ChunkItems(parts, bits.contiguous(), block.int().contiguous(), end, queries)


def _by_group(tree: GistTree, lists: BlockLists, items: slice, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Items sorted by KV head, sample and row, those of a group in the order of their blocks: keys, order, blocks."""
    _, block, head = (x[items] for x in lists.owners())
    sample = lists.blocks.table[block, 2].long()
    group = (head * tree.others.batch + sample) * tree.others.tokens + row
    if lists.kv_heads * tree.others.batch * tree.others.tokens < 2**31:
        group = group.int()  # half the passes of a radix sort
    group, order = group.sort(stable=True)
    return group.long(), order, block[order]


def _about(tree: GistTree, group: Tensor) -> Tensor:
    """[n, 3] int64: sample, KV head, row."""
    rows, batch = tree.others.tokens, tree.others.batch
    return torch.stack([group // rows % batch, group // rows // batch, group % rows], 1)


def _begins(x: Tensor) -> Tensor:
    """bool [n]: an entry is the first or another than the one before it."""
    begins = torch.ones_like(x, dtype=torch.bool)
    begins[1:] = x[1:] != x[:-1]
    return begins


def _ends(starts: Tensor, end: int) -> Tensor:
    """Where runs end that begin at ``starts``, the last one at ``end``."""
    return torch.cat([starts[1:], starts.new_full((min(1, len(starts)),), end)])


def _longest(tree: GistTree, lists: BlockLists, shortest: int, keys: int) -> int:
    """Longest part of a list, where all entries of all lists together stand for so many keys."""
    return max(shortest, -(-keys // max(1, tree.others.rows.numel() * lists.kv_heads)))


def _split(about: Tensor, start: Tensor, end: Tensor, longest: int) -> Parts:
    """Lists ``start .. end`` in parts. about: [n, 3] int64."""
    parts = -(-(end - start) // longest)
    split = parts > 1
    slots = parts * split
    first_slot = slots.cumsum(0) - slots
    sums = torch.cat([about[split], torch.stack([first_slot, parts], 1)[split]], 1)
    index, part = expand(parts)
    first = start[index] + part * longest
    last = torch.minimum(first + longest, end[index])
    slot = torch.where(split[index], first_slot[index] + part, -1)
    table = torch.cat([about[index], torch.stack([first, last, slot], 1)], 1)
    table = table[torch.argsort(last - first, descending=True, stable=True)]
    return Parts(table.int().contiguous(), sums.int().contiguous(), int(slots.sum()))


def near_items(tree: GistTree, tile_keys: int) -> tuple[Tensor, Tensor, KeyItems]:
    """What windows and sinks mean for d_k and d_v, as attention of one sample of N tokens over the B * R rows of all samples.

    Returns:
        lo, hi [S, N] int32 with S = 3 * B segments (gists, which nobody sees by range; raw tokens; sinks; of sample 0, ..), and
        the items of all rows, so that the rows of gists are written too (as zero). Memoised.
    """
    return tree.others.memo(("near items", tile_keys), lambda: _near_items(tree, tile_keys))


def _near_items(tree: GistTree, tile_keys: int) -> tuple[Tensor, Tensor, KeyItems]:
    others, level = tree.others, tree.levels
    batch, rows, queries = others.batch, others.rows.shape[1], tree.queries
    sample = tree.tokens // others.tokens
    offset = torch.arange(batch, device=sample.device) * rows
    lo, hi = torch.zeros(2, batch, 3, queries, dtype=torch.int32, device=sample.device)
    index = torch.arange(queries, device=sample.device)
    for x, ranges in ((lo, tree.lo), (hi, tree.hi)):
        x[sample, 1, index] = ranges[level] + offset[sample].int()
        x[sample, 2, index] = ranges[level + 1] + offset[sample].int()
    starts = others.segment_start[:, [level, level + 1]] + offset[:, None]
    bounds = torch.cat([torch.cat([offset[:, None], starts], 1).flatten(), offset.new_full((1,), batch * rows)])
    every = torch.arange(batch * rows, device=sample.device)[None]
    flat = Intervals(every, every, lo.flatten(0, 1)[None], hi.flatten(0, 1)[None], bounds[None].int())
    chunk = max(SHORTEST_SPLIT, -(-queries // SPLITS))
    items = key_items(flat, TokenSearch(flat), range(3 * batch), tile_keys, chunk, direct=True)
    return flat.lo[0], flat.hi[0], items
