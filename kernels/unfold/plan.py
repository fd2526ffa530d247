"""What the Triton kernels of unfolding work through once per micro-batch, by vectorised tensor operations.

The keys of windows and sinks against the queries that see them, in the tables of compressed attention; groups of gists above
level 0 against the blocks of queries that may select them. What every layer derives from its own selection is in turn.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.kernels.compressed.plan import SHORTEST_SPLIT, SPLITS, KeyItems, TokenSearch, expand, key_items
from unfold.kernels.intervals import Intervals
from unfold.kernels.select.blocks import query_blocks
from unfold.kernels.tree import GistTree

# A group of gists above level 0 that many blocks may visit is cut into parts of at most this many, or of so many that the partial
# sums hold no more numbers than d_k and d_v.
SHORTEST_PART = 64


def longest_chunk(tree: GistTree) -> int:
    """Most raw tokens behind a level-0 gist (memoised)."""
    return tree.planned("longest chunk", _longest_chunk)


def _longest_chunk(tree: GistTree) -> int:
    row = torch.arange(tree.others.tokens, device=tree.device)
    start = tree.others.segment_start[:, tree.levels - 1 : tree.levels + 1]
    of_level_0 = (row >= start[:, :1]) & (row < start[:, 1:])
    return int(((tree.child_hi - tree.child_lo) * of_level_0).amax())


def near_items(tree: GistTree, tile_keys: int) -> tuple[Tensor, Tensor, KeyItems]:
    """What windows and sinks mean for d_k and d_v, as attention of one sample of N tokens over the B * R rows of all samples.

    Returns:
        lo, hi [3, N] int32: what each query sees of its own sample's gists (which nobody sees by range), raw tokens and sinks;
        and the items of all rows, so that the rows of gists are written too (as zero). Linear in N. Memoised.
    """
    return tree.planned(("near items", tile_keys), lambda whole: _near_items(whole, tile_keys))


def _near_items(tree: GistTree, tile_keys: int) -> tuple[Tensor, Tensor, KeyItems]:
    others, level = tree.others, tree.levels
    batch, rows, queries = others.batch, others.rows.shape[1], tree.queries
    offset = torch.arange(batch, device=tree.device) * rows
    of_query = offset[tree.tokens // others.tokens].int()
    lo, hi = (F.pad(ranges[level : level + 2] + of_query, (0, 0, 1, 0)) for ranges in (tree.lo, tree.hi))
    starts = others.segment_start[:, [level, level + 1]] + offset[:, None]
    bounds = torch.cat([torch.cat([offset[:, None], starts], 1).flatten(), offset.new_full((1,), batch * rows)])
    every = torch.arange(batch * rows, device=tree.device)[None]
    flat = Intervals(every, every, lo[None], hi[None], bounds[None].int())
    chunk = max(SHORTEST_SPLIT, -(-queries // SPLITS))
    return lo, hi, key_items(flat, TokenSearch(flat), range(3 * batch), tile_keys, chunk, direct=True)


@dataclass(frozen=True)
class UpperParts:
    """Groups of ``width`` neighbouring gists above level 0 against the blocks of queries before which any of them stands.

    Attributes:
        table: [n, 6] int32: sample, first key row, last + 1, first block, last + 1, slot of the partial sum or -1 (then the part
            is all of its group). The longest come first.
        sums: [m, 5] int32, groups with partial sums: sample, first key row, last + 1, first slot, number of slots.
        slots: number of partial sums.
        keys: rows that such gists stand in, of the sample that has most.
    """

    table: Tensor
    sums: Tensor
    slots: int
    keys: int


def upper_parts(tree: GistTree, size: int, width: int) -> UpperParts:
    """For blocks of at most ``size`` queries; memoised."""
    return tree.planned(("upper parts", size, width), lambda whole: _upper_parts(whole, size, width))


def _upper_parts(tree: GistTree, size: int, width: int) -> UpperParts:
    blocks, above, device = query_blocks(tree, size), tree.levels - 1, tree.device
    keys = tree.others.segment_start[:, above].long()  # [B]
    groups = -(-keys // width)
    sample, number = expand(groups)
    first = number * width
    last = torch.minimum(first + width, keys[sample])

    # What the ranges of a block's queries reach, taken together, in each segment.
    lo, hi = tree.lo[:above].long(), tree.hi[:above].long()
    shape, index, none = (above, len(blocks.table)), blocks.of_query.expand_as(lo), hi <= lo
    least = torch.full(shape, 2**31, device=device).scatter_reduce_(1, index, lo.masked_fill(none, 2**31), "amin")
    most = torch.zeros(shape, dtype=torch.int64, device=device).scatter_reduce_(1, index, hi.masked_fill(none, 0), "amax")
    segment, block = (most > least).nonzero(as_tuple=True)
    base = (groups.cumsum(0) - groups)[blocks.table[block, 2].long()]
    reached = base + least[segment, block] // width, base + (most[segment, block] - 1) // width
    begin, end = _first_and_last(*reached, block, len(sample))

    longest = max(SHORTEST_PART, -(-int((end - begin).sum()) * width // tree.others.rows.numel()))
    parts = -(-(end - begin) // longest)  # none of a group that nobody may select
    group, part = expand(parts)
    start = begin[group] + part * longest
    stop = torch.minimum(start + longest, end[group])
    slots = parts * (parts > 1)
    first_slot = slots.cumsum(0) - slots
    slot = torch.where(parts[group] > 1, first_slot[group] + part, -1)
    table = torch.stack([sample[group], first[group], last[group], start, stop, slot], 1)
    order = torch.argsort(stop - start, descending=True, stable=True)
    sums = torch.stack([sample, first, last, first_slot, parts], 1)[parts > 1]
    return UpperParts(table[order].int().contiguous(), sums.int().contiguous(), int(slots.sum()), int(keys.max()))


def _first_and_last(first: Tensor, last: Tensor, number: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Of numbered ranges ``first .. last``, both included, the least number that covers each place, and the greatest + 1.

    0 and 0 where none does; all int64, ranges [n]. Linear in ranges and places: a range is two of a power of two, and all those
    of one length become shorter ones together.
    """
    nothing = 2**31  # tables are int32
    least, most = number.new_full((places,), nothing), number.new_zeros(places)  # of the next 2 ** k places
    length = last + 1 - first
    for k in reversed(range(int(length.max()).bit_length() if len(length) else 0)):
        i = ((length >> k) == 1).nonzero()[:, 0]
        at = torch.cat([first[i], last[i] + 1 - (1 << k)])
        least.scatter_reduce_(0, at, number[i].repeat(2), "amin")
        most.scatter_reduce_(0, at, number[i].repeat(2) + 1, "amax")
        if k:
            half = (1 << k) // 2
            behind = lambda x, empty, half=half: F.pad(x, (half, 0), value=empty)[: len(x)]
            least, most = torch.minimum(least, behind(least, nothing)), torch.maximum(most, behind(most, 0))
    return least.minimum(most), most


def level_0_gists(tree: GistTree) -> int:
    """Level-0 gists of the sample that has most, at least one (memoised)."""
    start = lambda whole: whole.others.segment_start[:, whole.levels - 1 : whole.levels + 1]
    return tree.planned("level-0 gists", lambda whole: max(1, int(start(whole).diff(dim=1).amax())))


def visible_copies(tree: GistTree) -> Tensor:
    """[B, T] int32, the row of each token's sink copy that a recalling query sees, or -1; memoised."""
    return tree.memo("sink copies that recalling queries see", lambda: _visible_copies(tree))


def _visible_copies(tree: GistTree) -> Tensor:
    rows, tokens, device = tree.others.rows, tree.others.tokens, tree.device
    copies, sample = rows.shape[1] - tokens, tree.tokens // tokens
    lo, hi = tree.lo[-1].long() - tokens, tree.hi[-1].long() - tokens
    one = (hi > lo).int()
    edges = torch.zeros(tree.others.batch * (copies + 1), dtype=torch.int32, device=device)
    for bound, sign in ((lo, 1), (hi, -1)):
        edges.index_add_(0, sample * (copies + 1) + bound.clamp(0, copies), one * sign)
    visible = edges.view(-1, copies + 1).cumsum(1)[:, :copies] > 0
    of_token = torch.full((tree.others.batch, tokens + 1), -1, dtype=torch.int32, device=device)
    row = torch.arange(tokens, rows.shape[1], dtype=torch.int32, device=device).expand_as(visible)
    return of_token.scatter_(1, rows[:, tokens:].masked_fill(~visible, tokens), row)[:, :tokens].contiguous()
