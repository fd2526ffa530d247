"""The size of a tile, for every op."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, warps of a program, stages of its software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int
