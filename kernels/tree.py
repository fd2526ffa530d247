"""Which rows lie behind which gist, and what the recalling queries start from (docs/method.md#recall).

In the level-sorted order of :class:`kernels.intervals.Intervals` the items that a gist closed are one contiguous range of
the next segment: level-(l-1) gists behind a level-l gist, raw tokens behind a level-0 gist. So the hierarchy is two integers
per gist, and what a query starts from is a few integers per segment: O(T) memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unfold.kernels.common.plans import Planned, to_device
from unfold.kernels.intervals import Intervals, QueryBlock, plan_blocks


@dataclass(frozen=True)
class GistTree(Planned):
    """The gists' children, and the ``N`` recalling queries of a micro-batch with their ranges of rows.

    ``B`` samples of ``T`` tokens, ``L`` gist levels; segments (0 is the top level, L - 1 level 0, L raw tokens, L + 1 sink
    copies) and rows are those of ``others``. Per query, all ranges lie within its document and before or at the query.

    Attributes:
        others: what the tokens that do not recall see; a recalling token sees nothing there.
        child_lo, child_hi: [B, T] int32, the rows ``[lo, hi)`` behind the gist in each row; empty in raw rows. Sinks are
            nobody's children: every query sees them anyway, and a key counts once. The raw tokens behind a gist may stand
            *apart*, behind the R rows of each of the B samples: apart row i is row ``(B - b) * R + i`` of sample b. No window
            holds them. Plans ask how many there are behind a gist, never where: a layer may say that for itself.
        parent: [B, T] int32, the row of the gist that closed the item in each row; -1 if nothing in its document did.
        tokens: [N] int64, the recalling queries as ``sample * T + token``, ascending.
        splits: B + 1 numbers; the queries of sample b are ``splits[b] .. splits[b + 1]``.
        lo, hi: [L + 2, N] int32. In a gist segment all gists of that level before the query; in the raw segment its own and
            the n_prev previous chunks up to itself; in the sink segment the sinks that those do not hold.
        tail: [L, N] int32, where the gists before the query begin whose parent is not closed yet; ``lo`` at the top.
        span: [N] int32, interleaved tokens of the query's document up to and including the query.
        host: the same on the host, where this was copied from it.
    """

    others: Intervals
    child_lo: Tensor
    child_hi: Tensor
    parent: Tensor
    tokens: Tensor
    splits: tuple[int, ...]
    lo: Tensor
    hi: Tensor
    tail: Tensor
    span: Tensor
    host: GistTree | None = field(default=None, repr=False, compare=False)

    @property
    def plans(self) -> dict[Hashable, Any]:
        return self.others.plans

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def levels(self) -> int:
        return self.tail.shape[0]

    @property
    def queries(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> GistTree:
        """The same tree on a device: this one, if it is there."""
        others = self.others.to(device)
        if others is self.others:
            return self
        move = lambda *names: (to_device(getattr(self, n), device) for n in names)
        before, after = move("child_lo", "child_hi", "parent", "tokens"), move("lo", "hi", "tail", "span")
        return GistTree(others, *before, self.splits, *after, self if self.device.type == "cpu" else None)

    def plan(self, block: int) -> list[list[QueryBlock]]:
        """For each sample, its recalling queries (numbered 0 .. N-1) in blocks, with the rows that their ranges span."""
        make = lambda tree: [tree._plan_sample(b, block) for b in range(tree.others.batch)]
        return self.planned(("recalling query blocks", block), make)

    def _plan_sample(self, sample: int, block: int) -> list[QueryBlock]:
        first, last = self.splits[sample : sample + 2]
        if first == last:
            return []
        blocks = plan_blocks(self.lo[None, :, first:last], self.hi[None, :, first:last], block)[0]
        return [QueryBlock(i.start + first, i.stop + first, i.spans) for i in blocks]
