"""What the Triton kernels of unfolding work through, by vectorised tensor operations.

Per layer, since every layer selects for itself: for d_k and d_v the lists of a selection turned round, from groups of keys to
the blocks that visit them (:func:`group_visits`), by one stable sort: no atomics, the same order in every run. Per
micro-batch: the keys of windows and sinks against the queries that see them (:func:`near_items`), in the tables of
compressed attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.compressed.plan import SHORTEST_SPLIT, SPLITS, KeyItems, TokenSearch, expand, key_items
from kernels.intervals import Intervals
from kernels.select.blocks import BlockLists
from kernels.tree import GistTree

# A group of keys that many blocks visit is split into parts of at most this many visits, or of so many that the partial sums
# hold no more numbers than d_k and d_v.
SHORTEST_PART = 64


@dataclass(frozen=True)
class Visits:
    """Groups of keys and the blocks that visit them.

    Attributes:
        parts: [n, 6] int32: sample, KV head, first key row, first visit, last + 1, slot of the partial sum or -1 (then the part
            is all of its group). The longest come first.
        visits: [m, 3] int32: block, first item, last + 1.
        row, bits: the items in the order of the visits.
        sums: [k, 5] int32, groups with partial sums: sample, KV head, first key row, first slot, number of slots.
        slots: number of partial sums.
    """

    parts: Tensor
    visits: Tensor
    row: Tensor
    bits: Tensor
    sums: Tensor
    slots: int


def longest_chunk(tree: GistTree) -> int:
    """Most raw tokens behind a level-0 gist (memoised: one sync per micro-batch)."""
    row = torch.arange(tree.others.tokens, device=tree.tokens.device)
    start = tree.others.segment_start[:, tree.levels - 1 : tree.levels + 1]
    of_level_0 = (row >= start[:, :1]) & (row < start[:, 1:])
    return tree.others.memo("longest chunk", lambda: int(((tree.child_hi - tree.child_lo) * of_level_0).amax()))


def group_visits(tree: GistTree, lists: BlockLists, width: int, chunks: bool) -> Visits:
    """The lists turned round: of ``chunks``, or of groups of ``width`` neighbouring gists above level 0."""
    begin = int(lists.first[-1, 0])
    items = slice(begin, None) if chunks else slice(0, begin)
    _, block, head = (x[items] for x in lists.owners())
    row, bits = lists.row[items], lists.bits[items]
    sample = lists.blocks.table[block, 2].long()
    rows = tree.others.tokens
    group = (head * tree.others.batch + sample) * rows + (row if chunks else row // width * width)
    group, order = group.sort(stable=True)
    block = block[order]

    new_group = torch.ones_like(group, dtype=torch.bool)
    new_group[1:] = group[1:] != group[:-1]
    new_visit = new_group.clone()
    new_visit[1:] |= block[1:] != block[:-1]
    item = new_visit.nonzero()[:, 0]
    visits = torch.stack([block[item], item, torch.cat([item[1:], item.new_full((min(1, len(item)),), len(group))])], 1)
    of_group = new_group[item].nonzero()[:, 0]  # first visit of each group
    end = torch.cat([of_group[1:], of_group.new_full((min(1, len(of_group)),), len(item))])
    group = group[item[of_group]]
    about = torch.stack([group // rows % tree.others.batch, group // rows // tree.others.batch, group % rows], 1)

    longest = max(SHORTEST_PART, -(-len(item) * width // max(1, tree.others.rows.numel() * lists.kv_heads)))
    parts = -(-(end - of_group) // longest)
    slots = parts * (parts > 1)
    first_slot = slots.cumsum(0) - slots
    split = parts > 1
    sums = torch.cat([about[split], torch.stack([first_slot, parts], 1)[split]], 1)
    index, part = expand(parts)
    start = of_group[index] + part * longest
    stop = torch.minimum(start + longest, end[index])
    slot = torch.where(split[index], first_slot[index] + part, -1)
    table = torch.cat([about[index], torch.stack([start, stop, slot], 1)], 1)
    table = table[torch.argsort(stop - start, descending=True, stable=True)]
    table, visits, sums = (x.int().contiguous() for x in (table, visits, sums))
    return Visits(table, visits, row[order].contiguous(), bits[order].contiguous(), sums, int(slots.sum()))


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
