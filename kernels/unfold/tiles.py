"""Tile sizes of the unfold kernels: one small table per architecture, no autotuning; see docs/kernels.md for the choice."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
from torch import Tensor

from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed.tiles import choose_tiles
from unfold.kernels.select.blocks import BITS

LARGEST_TILE = 128  # rows of a tile: query heads of one KV head at most
LONGEST_CHUNK = 127  # raw tokens behind one level-0 gist at most


@dataclass(frozen=True)
class UnfoldTiles:
    """Tiles of the forward kernel, d_q, and of d_k/d_v: by chunks, by gists above level 0, by windows and sinks.

    ``forward``, ``d_query`` and ``upper`` have the rows of one block of queries. The keys of ``chunks`` stand for chunks of
    c0 = 8 tokens, its rows for as many whole queries as fit.
    """

    forward: Tile
    d_query: Tile
    chunks: Tile
    upper: Tile
    near: Tile

    def block(self, group: int) -> int:
        """Queries of a block, for a number of query heads per KV head."""
        return max(1, min(BITS, self.forward.rows // group))

    def of(self, q: Tensor, k: Tensor, longest_chunk: int) -> UnfoldTiles:
        """Fitted to q [.., H, D] and k [B, T, Hkv, D]."""
        return self.fit(q.shape[-2] // k.shape[2], longest_chunk)

    def fit(self, group: int, longest_chunk: int) -> UnfoldTiles:
        """With as many rows as a block of queries has, and room for the longest chunk."""
        rows = max(16, triton.next_power_of_2(self.block(group) * group))
        keys = max(16, triton.next_power_of_2(1 + longest_chunk))
        chunks = replace(self.chunks, rows=max(self.chunks.rows, triton.next_power_of_2(group)), keys=keys)
        change = {name: replace(getattr(self, name), rows=rows) for name in ("forward", "d_query", "upper")}
        return replace(self, **change, chunks=chunks)


def choose_unfold_tiles(architecture: str, block_dim: int, item_size: int) -> UnfoldTiles:
    """Tiles for an architecture of TABLE, a head dimension (padded to a power of two) and bytes per element."""
    near = choose_tiles(architecture, block_dim, item_size).local
    return UnfoldTiles(*TABLE[architecture][block_dim, item_size], near)


# Forward, d_q, chunks, upper. 32 rows: eight queries of four heads, see docs/kernels.md; within 99 KB of shared memory.
_SM80 = {
    (64, 2): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 16, 4, 2), Tile(32, 16, 4, 2)),
    (128, 2): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 16, 4, 2), Tile(32, 16, 4, 2)),
    (256, 2): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 2), Tile(32, 16, 8, 2), Tile(32, 16, 8, 2)),
    (64, 4): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    (128, 4): (Tile(16, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (256, 4): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# 64 rows: sixteen queries of four heads. As measured on an H200 at 32k (docs/performance.md), but for the last one: eight warps,
# since with four the present kernel spills twice as much as the one that was measured.
_SM90 = _SM80 | {(128, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 16, 1, 2), Tile(64, 64, 8, 2))}
# Triton's interpreter: small, so that few tokens already make several tiles of every kind.
_SMALL = (Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))

TABLE = {
    "sm_80": _SM80,
    "sm_90": _SM90,
    "sm_100": _SM90,
    "interpreter": {(dim, size): _SMALL for dim in (64, 128, 256) for size in (2, 4)},
}
