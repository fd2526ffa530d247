"""How much room the lists of a selection take at most: known before anything is selected, once per micro-batch, on the host.

A row of a block takes as many gists as its budget says, or all that there are before it; all rows together take no gist twice and
none outside of what they span. So every list has a place of its own, wherever the scores lead; its length stays on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.kernels.common.launch import INTERPRETED
from unfold.kernels.select.blocks import QueryBlocks, query_blocks
from unfold.kernels.select.kernels import ROOM_UNIT
from unfold.kernels.select.selection import SelectRule
from unfold.kernels.tree import GistTree

UNIT = ROOM_UNIT.value
# Places of chunks at once, eight bytes each. In the interpreter so few that the tests go through several slices.
PLACES = 2**9 if INTERPRETED else 2**27


@dataclass(frozen=True)
class ListRoom:
    """Room for the lists of blocks, ``lists`` of them: KV heads within blocks.

    Attributes:
        first: [L, lists] int64, where the items of each list begin; lists of segment 0 first.
        items: of all lists together, at most.
        start: [lists + 1] int64, where the places of the chunks of each list begin.
        slices: of blocks, whose places fit PLACES: first, last + 1, places.
        entries: pairs of a query and a level-0 gist that it takes for a KV head, at most.
        rooms: per segment, most candidates of a list, in units of UNIT.
        spans: per segment [blocks, 2] int32, the first candidate that needs no selected parent, and how many there are.
        budgets: per segment [N] int32.
    """

    first: Tensor
    items: int
    start: Tensor
    slices: tuple[tuple[int, int, int], ...]
    entries: int
    rooms: tuple[int, ...]
    spans: tuple[Tensor, ...]
    budgets: tuple[Tensor, ...]


def list_room(tree: GistTree, rule: SelectRule, size: int, heads: int, kv_heads: int) -> ListRoom:
    """The (memoised) room for blocks of at most ``size`` queries."""
    key = ("room of lists", rule, size, heads, kv_heads)
    return tree.planned(key, lambda whole: _list_room(whole, rule, size, heads // kv_heads, kv_heads))


def _list_room(tree: GistTree, rule: SelectRule, size: int, group: int, kv_heads: int) -> ListRoom:
    blocks, levels = query_blocks(tree, size), tree.levels
    rows = 1 if rule.share == "group" else group  # of a query
    lo, hi = tree.lo[:levels], tree.hi[:levels]
    budgets = [rule.budget(tree.span, hi[s] - lo[s], group).int().contiguous() for s in range(levels)]
    taken = torch.stack(budgets).long().minimum((hi - lo).long())  # [L, N], by a row
    per_block = torch.zeros(levels, len(blocks.table), dtype=torch.int64, device=tree.device)
    per_block.index_add_(1, blocks.of_query, taken * rows)
    first, last = _spanned(blocks, lo, hi)  # [L, blocks]
    items = torch.minimum(per_block, last - first)
    spans = _open_spans(tree, blocks)

    families = _longest_families(tree)
    candidates = [last[0] - first[0]]
    for s in range(1, levels):
        candidates.append(torch.minimum(items[s - 1] * families[s - 1] + spans[s, :, 1], last[s] - first[s]))
    rooms = tuple(max(1, -(-int(c.max()) // UNIT)) for c in candidates)

    behind = _raw_behind(tree, blocks, first[-1], last[-1])
    places = items[-1] + torch.minimum(items[-1] * families[-1], behind)
    each = items.repeat_interleave(kv_heads, 1).flatten()
    starts = each.cumsum(0) - each
    start = F.pad(places.repeat_interleave(kv_heads).cumsum(0), (1, 0))
    entries = int(taken[-1].mul(rows).minimum(hi[-1] - lo[-1]).sum()) * kv_heads
    slices = slices_of(start, kv_heads)
    return ListRoom(
        starts.view(levels, -1), int(each.sum()), start, slices, entries, rooms, tuple(spans.int().contiguous()), tuple(budgets)
    )


def slices_of(start: Tensor, kv_heads: int) -> tuple[tuple[int, int, int], ...]:
    """Blocks in as few slices as fit PLACES, one of a block at least; start: [lists + 1], as in :class:`ListRoom`."""
    edges = start[::kv_heads].tolist()
    slices, begin = [], 0
    for end in range(1, len(edges)):
        if end + 1 == len(edges) or edges[end + 1] - edges[begin] > PLACES:
            slices.append((begin, end, edges[end] - edges[begin]))
            begin = end
    return tuple(slices)


def _queries(blocks: QueryBlocks) -> Tensor:
    """[blocks, size] int64, the queries of each; the last one stands for those that a block lacks."""
    first, last = blocks.table[:, :1].long(), blocks.table[:, 1:2].long()
    return torch.minimum(first + torch.arange(blocks.size, device=first.device), last - 1)


def _spanned(blocks: QueryBlocks, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """First and last + 1 of what the ranges of a block's queries span, of those that hold anything; [.., N] -> [.., blocks]."""
    query = _queries(blocks)
    lo, hi = lo[..., query].long(), hi[..., query].long()
    some = hi > lo
    end = hi.masked_fill(~some, 0).amax(-1)
    first = lo.masked_fill(~some, torch.iinfo(lo.dtype).max).amin(-1)
    return first.masked_fill(end == 0, 0), end


def _open_spans(tree: GistTree, blocks: QueryBlocks) -> Tensor:
    """[L, blocks, 2]: the gists that need no selected parent.

    They reach to the last gist before any query of the block, so that a gist before them is somebody's child, and one among them
    is a candidate once, whether as an open gist of one query or as a child of another one's selected parent.
    """
    levels = tree.levels
    first, end = _spanned(blocks, tree.tail, tree.hi[:levels])
    last = _spanned(blocks, tree.lo[:levels], tree.hi[:levels])[1]
    end[1:] = torch.where(end[1:] > 0, last[1:], 0)
    return torch.stack([first, end - first], -1)


def _longest_families(tree: GistTree) -> list[int]:
    """Per segment, most children of a gist."""
    row = torch.arange(tree.others.tokens, device=tree.device)
    width, found = tree.child_hi - tree.child_lo, []
    for s in range(tree.levels):
        start = tree.others.segment_start[:, s : s + 2]
        found.append(int((width * ((row >= start[:, :1]) & (row < start[:, 1:]))).amax()))
    return found


def _raw_behind(tree: GistTree, blocks: QueryBlocks, first: Tensor, last: Tensor) -> Tensor:
    """[blocks], raw tokens behind the level-0 gists of rows [first, last) of each block's sample, wherever those stand."""
    offset = blocks.table[:, 2].long() * tree.others.tokens
    before = F.pad((tree.child_hi - tree.child_lo).flatten().cumsum(0), (1, 0))
    return before[offset + last] - before[offset + first]
