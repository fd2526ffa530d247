"""Tiles, warps and splits of the decoding kernels: a small table, no autotuning (tests.benchmarks.gpu.decode_times sweeps it)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Keys of a tile, warps of a program, stages of its software pipeline."""

    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DecodeTiles:
    """How every kernel of a step is launched.

    Attributes:
        top, below, attend: score the top level, score below it, attend.
        programs: as many as the splits of a launch may make, of all queries and KV heads together.
        splits: of one KV head, where it attends; more cost the sum over them.
        held: scores that a thread of the search holds where there are many; makes its warps.
        part: dimensions of one program that adds up splits; its warps are ``combine_warps``.
    """

    top: Launch
    below: Launch
    attend: Launch
    programs: int = 4224
    splits: int = 128
    held: int = 16
    part: int = 32
    combine_warps: int = 4

    def search_warps(self, scores: int) -> int:
        """Warps of a program that searches so many scores: few scores a thread, until there is a warp for each of the four
        schedulers of a multiprocessor; more warps repeat the arithmetic between the passes beside one another."""
        return max(1, min(4, scores // 128), min(16, scores // (32 * self.held)))


# By bytes of a row of keys, padded to a power of two elements: the first that is no smaller. Attending has a thread per key: with
# more, Triton has several threads work out the same place.
TABLE = {
    256: DecodeTiles(Launch(64, 4, 1), Launch(64, 4, 1), Launch(32, 1, 1), splits=256),
    1024: DecodeTiles(Launch(16, 4, 1), Launch(16, 4, 1), Launch(16, 4, 1)),
}


def decode_tiles(block_dim: int, item_size: int) -> DecodeTiles:
    """The tiles for a head dimension, padded to a power of two, and bytes per element."""
    return next(tiles for size, tiles in TABLE.items() if block_dim * item_size <= size)
