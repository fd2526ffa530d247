"""The teacher's masses themselves, for measures: coverage is that of the selected chunks over that of the best ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.route.cpu import rows_of, sample_masses
from unfold.kernels.route.op import check_routed
from unfold.kernels.route.queries import Routed


@dataclass(frozen=True)
class ChunkMass:
    """The teacher's masses of a block of queries of one sample, by gist segment (0 is the top level, the last is level 0).

    Attributes:
        queries: which of the M sampled ones.
        sample: of the micro-batch.
        first: per segment, the row of the level-sorted order that the first column stands for.
        mass: per segment, [queries, H, width] at least fp32: the share of a query's attention that falls to the raw tokens
            behind each gist. Zero for gists that do not stand before the query in its document.
    """

    queries: slice
    sample: int
    first: tuple[int, ...]
    mass: tuple[Tensor, ...]


def chunk_mass(q: Tensor, k: Tensor, routed: Routed, far: bool = False, scale: float | None = None) -> Iterator[ChunkMass]:
    """The masses of all sampled queries, a block of neighbouring ones at a time, so that memory stays linear in T.

    Arguments as for :func:`kernels.route.routing_loss`, on any device; no gradient.
    """
    check_routed(q, k, routed)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _blocks(q.detach(), k.detach(), routed, far, scale)


def _blocks(q: Tensor, k: Tensor, routed: Routed, far: bool, scale: float) -> Iterator[ChunkMass]:
    kv_heads = k.shape[2]
    for rows in rows_of(routed, q.shape[1] // kv_heads):
        heads: list[list[Tensor]] = []
        for block, h, _, _, _, mass in sample_masses(q, k, rows, routed, far, scale):
            heads.append(mass)
            if h < kv_heads - 1:
                continue
            count = block.queries.stop - block.queries.start
            # [slots, queries * group] of every KV head -> [queries, H, slots]
            join = lambda parts, n=count: torch.stack([x.unflatten(1, (n, -1)) for x in parts], 2).flatten(2).permute(1, 2, 0)
            mass = tuple(join(parts) for parts in zip(*heads))
            first = tuple(r[0] + span[0] for r, span in zip(rows.rows, block.spans))
            yield ChunkMass(block.queries, rows.sample, first, mass)
            heads = []
