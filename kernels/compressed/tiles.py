"""Tile sizes of the compressed attention kernels: one small table per architecture, no autotuning.

For Hopper at head dimension 128 in 16 bits what was fastest of the tiles measured on an H200 (docs/performance.md), else what
compiles without spilling and is widest in keys and rows under that condition (docs/benchmarks/compressed_aot.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from unfold.kernels.common.tiles import Tile


@dataclass(frozen=True)
class Tiles:
    """The tiles of every kernel: forward, d_q, and d_k/d_v for the top segment, the other segments, the sink copies."""

    forward: Tile
    d_query: Tile
    top: Tile
    local: Tile
    sink: Tile


def choose_tiles(architecture: str, block_dim: int, item_size: int) -> Tiles:
    """Tiles for an architecture of TABLE, a head dimension (padded to a power of two) and bytes per element."""
    return TABLE[architecture][block_dim, item_size]


# Within 99 KB of shared memory, so that the smaller cards of compute capability 8.x can run them too.
_SM80 = {
    (64, 2): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 2), Tile(64, 16, 4, 2)),
    (128, 2): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 128, 8, 2), Tile(32, 64, 4, 2), Tile(64, 16, 4, 2)),
    (256, 2): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 4, 2)),
    (64, 4): Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),
    (128, 4): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
    (256, 4): Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
_SM90 = {
    (64, 2): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 16, 4, 2)),
    (128, 2): Tiles(Tile(64, 32, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(64, 16, 4, 3)),
    (256, 2): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 4, 2)),
    (64, 4): _SM80[64, 4],
    (128, 4): _SM80[128, 4],
    (256, 4): _SM80[256, 4],
}
# Triton's interpreter: small, so that few tokens already make several tiles of every kind.
_INTERPRETER = {
    2: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(128, 16, 4, 1)),
    4: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)),
}

TABLE = {
    "sm_80": _SM80,
    "sm_90": _SM90,
    "sm_100": _SM90,
    "interpreter": {(dim, size): tiles for dim in (64, 128, 256) for size, tiles in _INTERPRETER.items()},
}
