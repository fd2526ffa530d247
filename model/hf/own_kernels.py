"""Gist attention through unfold's own kernels, where they are installed. Shipped with exports; works without them.

They serve passes that begin a sequence (training, a prompt): there a sequence is a sample as in training. What goes on from
a cache is done in plain PyTorch.
"""

from __future__ import annotations

import dataclasses
from math import prod
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.model.gist.growing import Sight, families

from .gist_sequence import GistSettings

# What this file fills in: other fields are another interface.
INTERVALS = ("rows", "row_of", "lo", "hi", "segment_start", "plans", "host")
RULE = ("ratio", "chunk", "topk", "top_p", "share", "everything")
TREE = ("others", "child_lo", "child_hi", "parent", "tokens", "splits", "lo", "hi", "tail", "span", "host")


def find_kernels() -> SimpleNamespace | None:
    """The kernels; None where unfold is not installed, or in a version with other ones."""
    try:
        from unfold.kernels.compressed import compressed_attention
        from unfold.kernels.intervals import Intervals
        from unfold.kernels.select import SelectRule, select_gists
        from unfold.kernels.tree import GistTree
        from unfold.kernels.unfold import unfold_attention
    except ImportError:
        return None
    for kind, names in ((Intervals, INTERVALS), (GistTree, TREE), (SelectRule, RULE)):
        if tuple(field.name for field in dataclasses.fields(kind)) != names:
            return None
    return SimpleNamespace(
        compressed_attention=compressed_attention,
        select_gists=select_gists,
        unfold_attention=unfold_attention,
        SelectRule=SelectRule,
        Intervals=Intervals,
        GistTree=GistTree,
    )


class WholeSequence:
    """One sequence from its start as a sample for the kernels.

    Args:
        kernels: from :func:`find_kernels`.
        sight: of all its tokens.
        settings: budget and sharing of the selection.
    """

    def __init__(self, kernels: SimpleNamespace, sight: Sight, settings: GistSettings):
        self.kernels, self.settings = kernels, settings
        self.counts = [len(which) for which in sight.members]
        counts = torch.tensor(self.counts, device=sight.lo.device)
        start = F.pad(counts.cumsum(0), (1, 0))  # [L+2] first row of each segment: gists from the top, raw tokens, sinks
        tokens, sink = int(start[-1]), settings.sink
        rows = torch.cat(sight.members)
        raw = sight.members[-1]
        copies = raw[torch.arange(sink, device=raw.device).clamp(max=len(raw) - 1)]
        lo = torch.cat([sight.lo + start[:-1, None], torch.full_like(sight.lo[:1], tokens)])
        hi = torch.cat([sight.hi + start[:-1, None], tokens + sight.sinks[None]])
        bounds = torch.cat([start, start[-1:] + sink])[None].int()
        self.intervals = kernels.Intervals(
            torch.cat([rows, copies])[None], rows.argsort()[None], lo[None].int(), hi[None].int(), bounds
        )
        self.recalling = sight.recalls.nonzero()[:, 0]
        if len(self.recalling):
            self.tree = self._tree(sight, start, lo, hi)
            ratio = settings.budget_ratio or prod(settings.chunk_sizes)
            how = (settings.topk, settings.top_p, settings.share, settings.unfold_all)
            self.rule = kernels.SelectRule(ratio, settings.chunk_sizes[0], *how)

    def _tree(self, sight: Sight, start: Tensor, lo: Tensor, hi: Tensor):
        """What lies behind each gist, and the recalling queries."""
        levels, at = self.settings.levels, self.recalling
        lo, hi = lo[:, at], hi[:, at]
        lo[:levels] = start[:levels, None]  # every gist before the query, not only those that it sees while forgetting
        return self.kernels.GistTree(
            self.intervals.without(sight.recalls[None]),
            *(x[None].int() for x in families(sight.ends, self.settings.sink, self.counts)),
            at,
            (0, len(at)),
            *(x.int() for x in (lo, hi, sight.tail[:, at] + start[:levels, None], sight.span[at])),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, recall: bool) -> Tensor:
        """q [H, n, D], k, v [Hkv, n, D] of the sequence's tokens in their order -> [H, n, D]; recall: in this layer."""
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))  # [1, n, H, D]
        recall = recall and len(self.recalling) > 0
        out = self.kernels.compressed_attention(q, k, v, self.tree.others if recall else self.intervals, scale=scale)[0]
        if recall:
            asking = q[0].index_select(0, self.recalling)
            selection = self.kernels.select_gists(asking, k, self.tree, self.rule, scale=scale)
            rows = self.kernels.unfold_attention(asking, k, v, self.tree, selection, scale=scale)
            out = out.index_copy(0, self.recalling, rows)
        return out.transpose(0, 1)
