"""Whether recall finds what attention looks for: how much of a layer's own attention to raw tokens lies behind what it selects.

*Coverage* is the attention mass (as of the routing loss' teacher: the softmax over all raw tokens of the document, summed per
group) of the gists that a head selects, over that of as many best ones. *Far* coverage leaves out the chunks in the query's
window, which are read anyway. A *hit*: among the gists selected at a level is the one above the chunk with the largest mass.
*Distance* of neighbours: 1 - |A and B| / |A or B| of what two neighbouring tokens select at level 0. No labels are needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from unfold.kernels.route import ChunkMass, Routed, chunk_mass
from unfold.kernels.select import Selection, SelectRule, select_gists
from unfold.kernels.tree import GistTree
from unfold.model.config import GistConfig
from unfold.model.gist import Layout, Recall
from unfold.model.gist.recall import RECALLS, ROUTES, first_rows
from unfold.model.visibility import MicroBatchAttention
from unfold.pretrain.parallel import Parallel

PAIRS = 64  # of neighbouring tokens per layer and micro-batch, spread evenly
BUCKETS = 24  # of distances between a query and a chunk, each twice as far as the one before it
# What is summed per layer and level: mass of what was selected and of as many best ones; the same far away; hits; of how many.
# Last the summed entropy of what selection looks at, as a part of that of an even choice, and of how many choices.
MASS, BEST, FAR_MASS, FAR_BEST, HITS, COUNT, ENTROPY, CHOICES = range(8)


@dataclass
class RoutingMeasure:
    """Sums over heads and sampled queries, by layer and level.

    Attributes:
        gist: how the model folds and recalls.
        layers: of the model.
        once: measure a layer in the first micro-batch alone.
        sums: [layers, levels, 8] float64, see above.
        apart: [layers, 2] float64, summed distances of neighbours, and of how many.
        by_distance: [layers, BUCKETS, 2] float64, MASS and BEST of level 0 by how far the chunk lies behind.
    """

    gist: GistConfig
    layers: int
    once: bool = True
    sums: Tensor = field(init=False)
    apart: Tensor = field(init=False)
    by_distance: Tensor = field(init=False)
    measured: set[int] = field(default_factory=set)

    def __post_init__(self):
        zeros = lambda *shape: torch.zeros(self.layers, *shape, dtype=torch.float64)
        self.sums, self.apart, self.by_distance = zeros(self.gist.levels, 8), zeros(2), zeros(BUCKETS, 2)

    def look(self, attend: MicroBatchAttention, index: int, q: Tensor, k: Tensor) -> None:
        """Measure one layer; a :data:`unfold.pretrain.monitor.probe.Look`."""
        recall = attend.recall_in(index)
        if recall is None or self.once and index in self.measured:
            return
        self.measured.add(index)
        self._measure(index, q.detach(), k.detach(), attend.layout, recall)

    def reduce(self, parallel: Parallel) -> None:
        """Add up what the ranks have. A collective."""
        for part in (self.sums, self.apart, self.by_distance):
            total = part.to(parallel.device)
            dist.all_reduce(total)
            part.copy_(total)

    def by_layer(self) -> list[dict]:
        """Of each layer that recalls: its number, lists by level, the distance of neighbours; None where nothing was to find."""
        found = []
        for layer in range(self.layers):
            if float(self.sums[layer, 0, COUNT]):
                found.append({"layer": layer} | _shares(self.sums[layer], self.apart[layer]))
        return found

    def overall(self) -> dict[str, float]:
        """``coverage_0``, ``far_coverage_0``, ``hit_0``, .. and ``neighbour_distance``, over all layers."""
        shares = _shares(self.sums.sum(0), self.apart.sum(0))
        named = {f"{name}_{level}": x for name, by_level in shares.items() if isinstance(by_level, list)
                 for level, x in enumerate(by_level)}  # fmt: skip
        named["neighbour_distance"] = shares["neighbour_distance"]
        return {name: value for name, value in named.items() if value is not None}

    def _measure(self, index: int, q: Tensor, k: Tensor, layout: Layout, recall: Recall) -> None:
        routed = neighbours(layout, self.gist, recall)
        if routed is None:
            return
        tree = routed.tree
        asking = q.flatten(0, 1).index_select(0, tree.tokens)
        selection = by_head(asking, k, tree, recall.rule)
        for near, far in zip(chunk_mass(asking, k, routed), chunk_mass(asking, k, routed, far=True), strict=True):
            chosen = [chosen_of(selection, s, near, q.shape[2]) for s in range(tree.levels)]
            reached = ancestors(near, tree)
            for s in range(tree.levels):
                level = tree.levels - 1 - s
                row = self.sums[index, level]
                for of, to, masses in ((MASS, BEST, near), (FAR_MASS, FAR_BEST, far)):
                    best = best_ones(masses.mass[s], chosen[s].sum(-1))
                    row[of] += (masses.mass[s] * chosen[s]).sum(dtype=torch.float64).cpu()
                    row[to] += (masses.mass[s] * best).sum(dtype=torch.float64).cpu()
                hit = chosen[s].gather(2, reached[s].clamp(min=0)[..., None])[..., 0]
                row[HITS] += (hit & (reached[s] >= 0)).sum().cpu()
                row[COUNT] += (reached[s] >= 0).sum().cpu()
                self._add_entropy(row, s, near, asking, k, layout, tree)
            self._add_distances(index, near, chosen[-1], tree)

    def _add_entropy(
        self, row: Tensor, s: int, near: ChunkMass, asking: Tensor, k: Tensor, layout: Layout, tree: GistTree
    ) -> None:
        """How evenly queries look at the gists of a segment that stand before them: entropy of softmax of their scores."""
        at, first, width = near.queries, near.first[s], near.mass[s].shape[2]
        places = first + torch.arange(width, device=k.device)
        keys = k[near.sample, layout.intervals.rows[near.sample, places].long()].float()  # [width, Hkv, D]
        query = asking[at].unflatten(1, (k.shape[2], -1)).float()  # [queries, Hkv, group, D]
        scores = torch.einsum("qhgd,whd->qhgw", query, keys).flatten(1, 2) / math.sqrt(k.shape[3])
        there = (places >= tree.lo[s, at, None]) & (places < tree.hi[s, at, None])  # [queries, width]
        several = there.sum(1) > 1
        softmax = scores[several].masked_fill(~there[several, None], -torch.inf).softmax(-1)
        even = there[several].sum(1).double().log()[:, None]
        row[ENTROPY] += (torch.special.entr(softmax).sum(-1, dtype=torch.float64) / even).sum().cpu()
        row[CHOICES] += softmax.shape[0] * softmax.shape[1]

    def _add_distances(self, index: int, near: ChunkMass, chosen: Tensor, tree: GistTree) -> None:
        """By how far a chunk lies behind, and how far apart neighbours select. chosen: [queries, H, width] of level 0."""
        at = near.queries
        row = near.first[-1] + torch.arange(chosen.shape[2], device=chosen.device)
        behind = tree.hi[tree.levels, at, None] - tree.child_hi[near.sample, row]  # raw tokens, [queries, width]
        bucket = behind.clamp(min=1).float().log2().long().clamp(max=BUCKETS - 1)
        best = best_ones(near.mass[-1], chosen.sum(-1))
        for column, which in enumerate((chosen, best)):
            weight = (near.mass[-1] * which).sum(1, dtype=torch.float64)
            self.by_distance[index, :, column].index_add_(0, bucket.flatten().cpu(), weight.flatten().cpu())
        pairs = tree.tokens[at].diff() <= tree.levels + 1  # a gist of every level may stand between two raw tokens
        a, b = chosen[:-1][pairs], chosen[1:][pairs]
        union = (a | b).sum(-1)
        apart = 1 - (a & b).sum(-1) / union.clamp(min=1)
        self.apart[index, 0] += apart[union > 0].sum(dtype=torch.float64).cpu()
        self.apart[index, 1] += (union > 0).sum().cpu()


def _shares(sums: Tensor, apart: Tensor) -> dict:
    """sums: [levels, 8]; apart: [2]."""
    ratio = lambda a, b: float(a) / float(b) if float(b) else None
    return {
        "coverage": [ratio(row[MASS], row[BEST]) for row in sums],
        "far_coverage": [ratio(row[FAR_MASS], row[FAR_BEST]) for row in sums],
        "hit": [ratio(row[HITS], row[COUNT]) for row in sums],
        "selection_entropy": [ratio(row[ENTROPY], row[CHOICES]) for row in sums],
        "neighbour_distance": ratio(*apart),
    }


def neighbours(layout: Layout, gist: GistConfig, recall: Recall) -> Routed | None:
    """PAIRS of neighbouring recalling tokens with a gist before them in their document, spread evenly; None: there is none."""
    recalls = recall.flags > 0
    gists = gist.levels - 1  # the segment of level 0
    behind = layout.intervals.hi[:, gists] > first_rows(layout)[:, gists]
    able = (recalls & behind).flatten().nonzero()[:, 0]
    if not len(able):
        return None
    if len(able) > 2 * PAIRS:
        first = torch.linspace(0, len(able) - 2, PAIRS, device=able.device).round().long()
        able = able[torch.cat([first, first + 1]).unique()]
    flags = torch.zeros_like(recall.flags)
    flags.view(-1)[able] = RECALLS | ROUTES
    return Recall.from_flags(layout, gist, flags).routing.routed


def by_head(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule) -> Selection:
    """What every query head selects: lists of (query, head), as if each had keys of its own. q: [M, H, D]."""
    group = q.shape[1] // k.shape[2]
    if rule.share == "group":  # one selection for all heads of a group
        shared = select_gists(q, k, tree, rule)
        lists = torch.arange(len(shared.start[0]) - 1, device=q.device).repeat_interleave(group)
        parts = [_repeated(rows, start, lists) for rows, start in zip(shared.rows, shared.start)]
        return Selection(*map(tuple, zip(*parts)), q.shape[1])
    # A head with keys of its own has a group of one: the ratio keeps the budget that it has.
    alone = replace(rule, ratio=rule.ratio * group)
    return select_gists(q, k.repeat_interleave(group, 2).contiguous(), tree, alone)


def _repeated(rows: Tensor, start: Tensor, lists: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of these numbers, one after another."""
    counts = start.diff()[lists]
    ends = counts.cumsum(0)
    at = torch.arange(int(ends[-1]), device=rows.device) - (ends - counts - start[:-1][lists]).repeat_interleave(counts)
    return rows[at], torch.nn.functional.pad(ends, (1, 0))


def chosen_of(selection: Selection, segment: int, block: ChunkMass, heads: int) -> Tensor:
    """Which gists were selected by the queries of a block: bool [queries, heads, width]."""
    rows, start = selection.rows[segment].long(), selection.start[segment]
    at = block.queries
    first, last = int(start[at.start * heads]), int(start[at.stop * heads])
    owner = torch.arange((at.stop - at.start) * heads, device=rows.device)
    owner = owner.repeat_interleave(start[at.start * heads : at.stop * heads + 1].diff())
    chosen = torch.zeros_like(block.mass[segment], dtype=torch.bool)
    chosen.view(len(chosen) * heads, -1)[owner, rows[first:last] - block.first[segment]] = True
    return chosen


def best_ones(mass: Tensor, count: Tensor) -> Tensor:
    """The ``count`` [queries, H] largest of every row of mass [queries, H, width]: bool alike."""
    order = mass.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(mass.shape[-1], device=mass.device).expand_as(order))
    return rank < count[..., None]


def ancestors(block: ChunkMass, tree: GistTree) -> list[Tensor]:
    """By segment the column of the gist above the chunk with the largest mass, [queries, H]; -1: not closed before the query."""
    at, levels = block.queries, tree.levels
    row = block.mass[-1].argmax(-1) + block.first[-1]
    found: list[Tensor] = []
    for s in reversed(range(levels)):
        there = (row >= tree.lo[s, at, None]) & (row < tree.hi[s, at, None])
        found.append(torch.where(there, row - block.first[s], -1))
        row = torch.where(there, tree.parent[block.sample, row.clamp(min=0)].long(), -1)
    return found[::-1]
