"""What the Triton kernels of routing work through: blocks of queries, and tiles of gists with the blocks that score them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.compressed.plan import expand
from unfold.kernels.route.gradient import gists_of
from unfold.kernels.route.queries import Routed

BLOCK_HEAD = 5  # columns of a block before its two per gist segment
ITEM = 6  # columns of a tile of gists


@dataclass(frozen=True)
class RoutePlan:
    """Made once per micro-batch; its sizes are read from the device.

    Attributes:
        blocks: [n, 5 + 2 L] int32: first query, last + 1, sample; first raw row that any of the queries has, last + 1; then per
            gist segment the first gist that any of them has, last + 1 (0, 0 if none has one).
        items: [m, 6] int32, tiles of gists of one segment that any query has: sample, first row, last + 1, segment; first
            block that scores some of them, last + 1. Those that most blocks score come first.
        widths: per gist segment, gists of the block that has most.
        gists: of the sample that has most.
    """

    blocks: Tensor
    items: Tensor
    widths: tuple[int, ...]
    gists: int


def route_plan(routed: Routed, queries: int, tile: int) -> RoutePlan:
    """The (memoised) plan: blocks of at most ``queries`` queries, tiles of ``tile`` gists."""
    return routed.planned(("route plan", queries, tile), lambda whole: _route_plan(whole, queries, tile))


def _route_plan(routed: Routed, queries: int, tile: int) -> RoutePlan:
    tree, device = routed.tree, routed.first.device
    splits = torch.tensor(tree.splits, device=device)
    sample, number = expand(-(-splits.diff() // queries))  # of every block
    first = splits[sample] + number * queries
    last = torch.minimum(first + queries, splits[sample + 1])
    query = torch.minimum(first[:, None] + torch.arange(queries, device=device), last[:, None] - 1)  # [n, queries]
    lo = torch.cat([tree.lo[: tree.levels], routed.first[None]])[:, query]  # [L + 1, n, queries]
    hi = tree.hi[: tree.levels + 1, query]
    some = hi > lo
    end = hi.masked_fill(~some, 0).amax(-1)  # [L + 1, n]
    begin = lo.masked_fill(~some, torch.iinfo(lo.dtype).max).amin(-1).masked_fill_(end == 0, 0)
    spans = torch.stack([begin, end], -1)
    spans = torch.cat([spans[-1:], spans[:-1]]).transpose(0, 1).flatten(1)  # [n, 2 L + 2], raw rows first
    blocks = torch.cat([torch.stack([first, last, sample], 1), spans], 1).int().contiguous()
    widths = tuple((end - begin)[:-1].amax(1).tolist())
    return RoutePlan(blocks, _items(routed, sample, begin, end, tile), widths, gists_of(routed))


def _items(routed: Routed, sample: Tensor, begin: Tensor, end: Tensor, tile: int) -> Tensor:
    """sample: [n], of every block; begin, end: [L + 1, n], the gists that each block has."""
    tree = routed.tree
    starts = tree.others.segment_start[:, : tree.levels + 1].long()  # [B, L + 1]
    pair, number = expand((-(-starts.diff(dim=1) // tile)).flatten())
    of, segment = pair // tree.levels, pair % tree.levels
    first = starts[of, segment] + number * tile
    last = torch.minimum(first + tile, starts[of, segment + 1])
    scored = (begin[segment] < last[:, None]) & (end[segment] > first[:, None]) & (sample == of[:, None])  # [m, n]
    index = torch.arange(len(sample), device=scored.device)
    to = torch.where(scored, index + 1, 0).amax(1)
    frm = torch.where(scored, index, len(sample)).amin(1)
    items = torch.stack([of, first, last, segment, frm, to], 1)[to > 0]
    order = torch.argsort(items[:, 5] - items[:, 4], descending=True, stable=True)
    return items[order].int().contiguous()
