"""The visible sets of a batch, as a few contiguous ranges per query over keys sorted by level (docs/method.md#who-sees-whom).

The keys of every sample are put in the order ``[top gists | .. | level-0 gists | raw tokens | sink copies]``. In that order
what one query sees is one range per *segment*, so two integers per query and segment say everything: O(T) memory.
A sink copy is a second row for one of a document's first raw tokens; a query counts it only where its raw window does
not hold the token already, so every key counts once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unfold.kernels.common.plans import Planned, to_device


@dataclass(frozen=True)
class Intervals(Planned):
    """Per query, per segment, a range ``[lo, hi)`` of rows of the level-sorted key buffer.

    ``B`` samples of ``T`` interleaved tokens each; ``S = levels + 2`` segments; ``R >= T`` rows (tokens, then sink copies).

    Attributes:
        rows: [B, R] int64, the token whose key stands in each row. Rows of the sink segment that no query sees
            (a document shorter than the sink, a sample with fewer documents than the batch's largest) repeat some token.
        row_of: [B, T] int64, the row of each token outside the sink segment (the inverse of ``rows``).
        lo, hi: [B, S, T] int32, the range of rows that a query sees in a segment; empty where ``lo == hi``.
        segment_start: [B, S + 1] int32, the first row of each segment, and R.
        plans: what :meth:`memo` keeps; shared by all layers of a micro-batch.
        host: the same on the host, where these were copied from it.
    """

    rows: Tensor
    row_of: Tensor
    lo: Tensor
    hi: Tensor
    segment_start: Tensor
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    host: Intervals | None = field(default=None, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def batch(self) -> int:
        return self.lo.shape[0]

    @property
    def segments(self) -> int:
        return self.lo.shape[1]

    @property
    def tokens(self) -> int:
        return self.lo.shape[2]

    def to(self, device: torch.device | str) -> Intervals:
        """The same intervals on a device: these, if they are there."""
        rows = to_device(self.rows, device)
        if rows is self.rows:
            return self
        others = (to_device(getattr(self, n), device) for n in ("row_of", "lo", "hi", "segment_start"))
        return Intervals(rows, *others, host=self if self.device.type == "cpu" else None)

    def without(self, queries: Tensor) -> Intervals:
        """The same row space, in which the tokens of ``queries`` (bool [B, T]) see nothing: their output is zero."""
        return replace(self, hi=torch.where(queries[:, None], self.lo, self.hi), plans={}, host=None)

    def dense_mask(self) -> Tensor:
        """bool [B, T, T], True where query (dim 1) sees key (dim 2). T x T memory: for tests and people, small T only."""
        row = torch.arange(self.rows.shape[1], device=self.rows.device)
        mask = torch.zeros(self.batch, self.tokens, self.tokens, dtype=torch.int32, device=self.rows.device)
        for s in range(self.segments):
            inside = (row >= self.lo[:, s, :, None]) & (row < self.hi[:, s, :, None])  # [B, T, R]
            mask.scatter_add_(2, self.rows[:, None].expand_as(inside), inside.int())
        assert int(mask.max()) <= 1, "a key counted twice"
        return mask.bool()

    def plan(self, block: int) -> list[list[QueryBlock]]:
        """For each sample, its queries in blocks of ``block``, with the key ranges that hold all they see."""
        return self.planned(("query blocks", block), lambda whole: plan_blocks(whole.lo, whole.hi, block))


@dataclass(frozen=True)
class QueryBlock:
    """Queries ``[start, stop)`` of one sample and, per segment that any of them sees, the rows ``[first, last)`` they span."""

    start: int
    stop: int
    spans: tuple[tuple[int, int, int], ...]  # (segment, first row, last row)


def plan_blocks(lo: Tensor, hi: Tensor, block: int) -> list[list[QueryBlock]]:
    """:meth:`Intervals.plan` for ranges ``lo``, ``hi`` [B, S, T]."""
    batch, segments, tokens = lo.shape
    blocks = -(-tokens // block)
    pad = blocks * block - tokens
    seen = hi > lo
    # An empty range must not widen its block's span, so it counts as (+inf, -inf).
    first = torch.nn.functional.pad(lo.masked_fill(~seen, torch.iinfo(lo.dtype).max), (0, pad), value=2**31 - 1)
    last = torch.nn.functional.pad(hi.masked_fill(~seen, 0), (0, pad), value=0)
    first = first.view(batch, segments, blocks, block).amin(-1).transpose(1, 2).tolist()  # [B, blocks, S]
    last = last.view(batch, segments, blocks, block).amax(-1).transpose(1, 2).tolist()
    plan = []
    for sample in range(batch):
        plan.append(
            [
                QueryBlock(
                    i * block,
                    min((i + 1) * block, tokens),
                    tuple((s, a, b) for s, (a, b) in enumerate(zip(first[sample][i], last[sample][i])) if b > a),
                )
                for i in range(blocks)
            ]
        )
    return plan
