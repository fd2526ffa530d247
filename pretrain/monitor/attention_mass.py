"""Where attention goes: the share of softmax mass on each level of gists, raw tokens and sinks, on a sample of queries.

Measured while the first validation batch passes through the model, by a hook on each attention layer: no pass of its own,
and memory for a few queries and what they see. Each rank adds up the layers, heads and queries that it holds, whatever
the parallel layout; only recall over context ranks that exchange gists is not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from unfold.kernels.intervals import Intervals
from unfold.kernels.select import select_gists
from unfold.kernels.tree import GistTree
from unfold.model.gist import Layout, Recall
from unfold.model.visibility import MicroBatchAttention
from unfold.pretrain.parallel import Parallel

QUERIES = 64  # raw tokens per rank and layer, spread evenly over a micro-batch
SATURATED = 0.99  # of a row's softmax mass on one key
ELEMENTS = 1 << 24  # of the keys that are gathered at a time


def kinds(levels: int) -> list[str]:
    """Names of what a query sees, in the order of the segments; last, the raw tokens that recall unfolds."""
    return [f"gist_{level}" for level in reversed(range(levels))] + ["raw", "sink", "unfolded"]


@dataclass(frozen=True)
class Seen:
    """What some queries see, as one list per query and KV head. M lists, W the longest.

    Attributes:
        query: [M] int64, index among the sampled queries; kv_head: [M] int64.
        row: [M, W] int64, rows of the level-sorted buffer of the query's sample.
        kind: [M, W] int64, index into :func:`kinds`; -1 where a list has ended.
    """

    query: Tensor
    kv_head: Tensor
    row: Tensor
    kind: Tensor


@dataclass
class AttentionMass:
    """Sums over layers, heads and queries.

    Attributes:
        levels: gist levels.
        layers: of the model, where logits are measured too; 0: they are not.
        mass: [levels + 3] float64, summed softmax mass by kind.
        sums: [layers, 4] float64: the largest logit, and sums over rows of softmax: saturated ones, their entropy, all.
        measured: layers that were measured already.
    """

    levels: int
    layers: int = 0
    mass: Tensor = field(init=False)
    sums: Tensor = field(init=False)
    measured: set[int] = field(default_factory=set)

    def __post_init__(self):
        self.mass = torch.zeros(self.levels + 3, dtype=torch.float64)
        self.sums = torch.zeros(self.layers, 4, dtype=torch.float64)

    def shares(self, parallel: Parallel) -> dict[str, float] | None:
        """{kind: share} over all ranks; None when there was nothing to measure. A collective."""
        total = self.mass.to(parallel.device)
        dist.all_reduce(total)
        whole = float(total.sum())
        shares = {name: float(mass) / whole for name, mass in zip(kinds(self.levels), total)} if whole else {}
        if shares and not shares["unfolded"]:  # nothing recalls
            del shares["unfolded"]
        return shares or None

    def look(self, attend: MicroBatchAttention, index: int, q: Tensor, k: Tensor) -> None:
        """Measure a layer in the first micro-batch that passes it; a :data:`unfold.pretrain.monitor.probe.Look`."""
        if index not in self.measured:
            self.measured.add(index)
            row = self.sums[index] if self.layers else None
            self.mass += attention_mass(q, k, attend.layout_in(index), attend.recall_in(index), row).cpu()

    def logits(self, parallel: Parallel) -> dict | None:
        """Over all ranks: the largest attention logit (after scaling), the share of saturated rows of softmax, the mean entropy
        in nats, and the largest logit of every layer; None when there was nothing to measure. A collective."""
        total = self.sums.to(parallel.device)
        largest = total[:, 0].contiguous()
        dist.all_reduce(total)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        saturated, entropy, rows = total[:, 1:].sum(0).tolist()
        if not rows:
            return None
        by_layer = largest.tolist()
        return {
            "largest": max(by_layer),
            "saturated": saturated / rows,
            "entropy": entropy / rows,
            "largest_by_layer": by_layer,
        }


@torch.no_grad()
def attention_mass(q: Tensor, k: Tensor, layout: Layout, recall: Recall | None = None, logits: Tensor | None = None) -> Tensor:
    """Softmax mass by kind of key, summed over sampled raw queries and all heads: float64 [levels + 3].

    Args:
        q: [B, T, H, D]; k: [B, T, Hkv, D], rotary applied.
        layout: of the micro-batch.
        recall: who unfolds chunks in this layer; None where nobody does.
        logits: [4] float64, a row of :attr:`AttentionMass.sums` to fill; None: they are not measured.
    """
    tokens, kv_heads, dim = k.shape[1:]
    queries = sample_queries(layout)
    total = torch.zeros(layout.intervals.segments + 1, dtype=torch.float64, device=q.device)
    if not len(queries):  # a rank that had no sample left to validate
        return total
    chosen = q.flatten(0, 1)[queries].view(len(queries), kv_heads, -1, dim)  # [n, Hkv, G, D]
    for seen in _what_they_see(q, k, queries, layout.intervals, recall):
        size = max(1, ELEMENTS // max(1, seen.row.shape[1] * dim))
        for query, head, row, kind in zip(*(x.split(size) for x in (seen.query, seen.kv_head, seen.row, seen.kind))):
            sample = (queries[query] // tokens)[:, None]
            keys = k[sample, layout.intervals.rows[sample, row], head[:, None]]  # [m, W, D]
            scores = torch.einsum("mgd,mwd->mgw", chosen[query, head].float(), keys.float()) / math.sqrt(dim)
            softmax = scores.masked_fill((kind < 0)[:, None], -torch.inf).softmax(-1)
            if logits is not None:
                _note_logits(logits, scores.masked_fill((kind < 0)[:, None], 0.0), softmax)
            weights = softmax.sum(1)  # over the group's heads, [m, W]
            total.index_add_(0, kind.clamp(min=0).flatten(), weights.double().flatten())
    return total


def _note_logits(row: Tensor, scores: Tensor, softmax: Tensor) -> None:
    """scores, softmax: [m, heads, W], 0 behind a list's end."""
    row[0] = max(float(row[0]), float(scores.abs().max()))
    row[1] += int((softmax.amax(-1) > SATURATED).sum())
    row[2] += float(torch.special.entr(softmax).sum(dtype=torch.float64))
    row[3] += softmax[..., 0].numel()


def sample_queries(layout: Layout) -> Tensor:
    """At most QUERIES raw tokens that see anything, as ``sample * T + token``, evenly spread: int64 [n]."""
    sees = (layout.intervals.hi > layout.intervals.lo).any(1)
    there = (sees & (layout.level < 0) & (layout.doc >= 0)).flatten().nonzero()[:, 0]
    if len(there) <= QUERIES:
        return there
    return there[torch.linspace(0, len(there) - 1, QUERIES, device=there.device).round().long()]


def _what_they_see(q: Tensor, k: Tensor, queries: Tensor, intervals: Intervals, recall: Recall | None) -> Iterator[Seen]:
    """Under the compressed mask, and of those that recall."""
    kv_heads = k.shape[2]
    recalls = torch.zeros_like(queries, dtype=torch.bool)
    if recall is not None and recall.tree.queries:
        place = torch.searchsorted(recall.tree.tokens, queries).clamp_(max=recall.tree.queries - 1)
        recalls = recall.tree.tokens[place] == queries
    if recalls.any():
        yield _recalled(q, k, recalls.nonzero()[:, 0], place[recalls], recall)
    forgetting = (~recalls).nonzero()[:, 0]
    if len(forgetting):
        row, kind = _ranges(*(x.transpose(1, 2).flatten(0, 1)[queries[forgetting]].long() for x in (intervals.lo, intervals.hi)))
        repeat = lambda x: x.repeat_interleave(kv_heads, 0)
        heads = torch.arange(kv_heads, device=k.device).repeat(len(forgetting))
        yield Seen(repeat(forgetting), heads, repeat(row), repeat(kind))


def _ranges(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [n, S] -> (rows, segments of the rows) [n, W], the ranges of each query side by side; -1 behind their end."""
    ends = (hi - lo).cumsum(1)  # [n, S]
    at = torch.arange(int(ends[:, -1].max()), device=lo.device).repeat(len(lo), 1)  # [n, W]
    kind = torch.searchsorted(ends, at, right=True)
    inside = kind < lo.shape[1]
    segment = kind.clamp(max=lo.shape[1] - 1)
    row = hi.gather(1, segment) - ends.gather(1, segment) + at
    return row * inside, kind.masked_fill(~inside, -1)


def _recalled(q: Tensor, k: Tensor, index: Tensor, place: Tensor, recall: Recall) -> Seen:
    """What recalling queries see. index: [m] among the sampled ones; place: [m] the same in the tree."""
    tree = _part_of(recall.tree, place)
    kv_heads, levels = k.shape[2], tree.levels
    selection = select_gists(q.flatten(0, 1)[tree.tokens], k, tree, recall.rule)
    bounds = torch.stack([tree.lo[levels:], tree.hi[levels:]]).tolist()  # [2, (window, sinks), m]
    sample = (tree.tokens // tree.others.tokens).tolist()
    child = torch.stack([tree.child_lo, tree.child_hi]).cpu()
    lists = [(rows.cpu(), start.tolist()) for rows, start in zip(selection.rows, selection.start)]
    rows, kinds_of = [], []
    for i in range(tree.queries * kv_heads):
        n = i // kv_heads
        window, sinks = (range(bounds[0][s][n], bounds[1][s][n]) for s in (0, 1))
        gists = [rows_[start[i] : start[i + 1]].tolist() for rows_, start in lists]
        chunks = [range(*child[:, sample[n], gist].tolist()) for gist in gists[-1]]
        unfolded = [row for chunk in chunks for row in chunk if row not in window]
        parts = [*gists, window, sinks, unfolded]
        rows.append(torch.tensor([row for part in parts for row in part]))
        kinds_of.append(torch.tensor([kind for kind, part in enumerate(parts) for _ in part]))
    pad = lambda lists, value: torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=value).to(k.device)
    heads = torch.arange(kv_heads, device=k.device).repeat(len(index))
    return Seen(index.repeat_interleave(kv_heads), heads, pad(rows, 0), pad(kinds_of, -1))


def _part_of(tree: GistTree, queries: Tensor) -> GistTree:
    """The tree with some of its recalling queries, ascending."""
    tokens = tree.tokens[queries]
    first = torch.arange(tree.others.batch + 1, device=tokens.device) * tree.others.tokens
    return replace(
        tree,
        others=replace(tree.others, plans={}, host=None),  # plans, and the host's copy that they are made of, are of all queries
        host=None,
        tokens=tokens,
        splits=tuple(torch.searchsorted(tokens, first).tolist()),
        lo=tree.lo[:, queries],
        hi=tree.hi[:, queries],
        tail=tree.tail[:, queries],
        span=tree.span[queries],
    )
