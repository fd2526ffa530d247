"""What the Triton kernels of unfolding work through once per micro-batch, by vectorised tensor operations.

The keys of windows and sinks against the queries that see them, in the tables of compressed attention; what every layer derives
from its own selection is in turn.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.kernels.compressed.plan import SHORTEST_SPLIT, SPLITS, KeyItems, TokenSearch, key_items
from unfold.kernels.intervals import Intervals
from unfold.kernels.tree import GistTree


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
        lo, hi [S, N] int32 with S = 3 * B segments (gists, which nobody sees by range; raw tokens; sinks; of sample 0, ..), and
        the items of all rows, so that the rows of gists are written too (as zero). Memoised.
    """
    return tree.planned(("near items", tile_keys), lambda whole: _near_items(whole, tile_keys))


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
