"""What a layer does beyond forgetting where tokens recall: how many gists its queries select, and what lists of them take.

Which gists are selected depends on the data; how many a query selects does not. Lists belong to blocks of neighbouring queries
and to KV heads, and hold each gist once that any query of the block selected. Here every head of every query draws its gists
by chance: so they have least in common, and lists are as long as they get.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unfold.kernels.select.blocks import BITS
from unfold.kernels.tree import GistTree
from unfold.model.config import GistConfig
from unfold.model.gist import Layout
from unfold.model.gist.recall import RECALLS, UNFOLDS_ALL, Recall, select_rule
from unfold.model.parallel.recall import RecallPlan

# Part of a sample's raw tokens that recall under gist.recall: suffix, where nothing else is said: question and answer.
SUFFIX = 0.1
ITEM = 20  # bytes of a selected gist in a list: its row, bits, how many took it, the list it is of, the place of its chunk
TURNED = 36  # bytes of it while lists are turned round for gradients of keys: sorted by gist, with where they came from
INT32, INT64 = 4, 8


@dataclass(frozen=True)
class Recalling:
    """A recalling layer of one sample, on one rank: what its queries score, select and read. Lists are those of one KV head.

    Attributes:
        queries: that select.
        scored, read: gists scored, and gists and raw tokens attended to, by a query and the query heads of a KV head: means.
        gists: of all levels.
        blocks: of queries.
        items: selected gists in all lists.
        places: of the chunks in all lists: a gist and the raw tokens behind it each.
        chosen: (query, chunk) pairs in them.
        candidates: gists among which the blocks choose, for each level from the top.
        words: int32 words that hold a bit for each row of a block.
        tree: bytes of what all layers share: what lies behind each gist, and where queries start.
        rows: keys in level-sorted order, fetched chunks included, among which queries read.
        fetched: raw tokens that come from other ranks.
        part: of the samples, in which queries select; in the others they unfold everything, or forget.
        pairs: useful (query, key) pairs of all ranks beyond those of forgetting, of a sample in which queries select.
        routed: (query, raw token) pairs of the routing loss; 0 without it.
    """

    queries: float
    scored: float
    read: float
    gists: float
    blocks: float
    items: float
    places: float
    chosen: float
    candidates: tuple[float, ...]
    words: int
    tree: int
    rows: int
    pairs: float
    fetched: int = 0
    part: float = 1.0
    routed: float = 0.0

    @property
    def levels(self) -> int:
        return len(self.candidates)

    def divided(self, ranks: int) -> Recalling:
        """With heads spread over so many ranks: an equal share of what each head has."""
        names = ("queries", "blocks", "items", "places", "chosen", "gists")
        share = {name: getattr(self, name) / ranks for name in names}
        return replace(self, **share, candidates=tuple(n / ranks for n in self.candidates))

    def lists(self) -> float:
        """Bytes of the lists that are kept for backward, of one KV head."""
        return ITEM * self.items + INT64 * (self.levels + 1) * self.blocks

    def selecting(self) -> float:
        """Most bytes that selection has at once, of one KV head: of a level the candidates and who takes them, and the candidates
        of the level below; at the end all lists twice, as levels and joined."""
        bits = INT32 * self.words
        at_top = [bits * self.candidates[0]] + [(INT32 + 2 * bits) * n for n in self.candidates[1:]]
        below = [(INT32 + bits) * n for n in self.candidates[1:]] + [0.0]
        return max(*(a + b for a, b in zip(at_top, below)), 2 * ITEM * self.items)

    def turning(self) -> float:
        """Bytes that lists take in backward beside themselves, of one KV head: turned round, with the queries of each chunk."""
        return TURNED * self.items + INT32 * self.chosen


def recall_of(layout: Layout, config: GistConfig, suffix: float, everything: bool) -> Recall | None:
    """Who recalls in a sample laid out as one document; None where nobody does. suffix: the part of its raw tokens that does
    under ``recall: suffix``, its end. everything: they unfold all that is before them."""
    raw = layout.text
    if config.recall == "suffix":
        first = raw.sum(1, keepdim=True) * (1 - suffix)
        raw = raw & (raw.cumsum(1) > first)
    return Recall.from_flags(layout, config, raw.int() * (RECALLS | UNFOLDS_ALL * everything))


def measure_recall(tree: GistTree, config: GistConfig, group: int, rows: int, seen: int) -> Recalling:
    """Count for one sample.

    Args:
        tree: its queries and what they choose from.
        group: query heads per KV head.
        rows: of a block.
        seen: gists that the queries see while forgetting, summed.
    """
    rule, levels = select_rule(config), tree.levels
    heads = group if rule.share == "head" else 1  # that select by themselves
    before = tree.hi[:levels] - tree.lo[:levels]
    gists, tails = before.double(), (tree.hi[:levels] - tree.tail).double()
    children = [float(size) for size in reversed(config.chunk_sizes)]  # behind a gist of each segment
    budget = torch.stack([rule.budget(tree.span, n, group) for n in before]).double().minimum(gists)
    for s in range(1, levels):  # a head chooses among children of what it has chosen
        budget[s] = budget[s].minimum(budget[s - 1] * children[s - 1] + tails[s])
    scored, read, _ = _chosen(gists, tails, budget, torch.full_like(gists[0], heads), children)

    size = max(1, min(BITS, rows // group))
    first = torch.arange(0, tree.queries, size)
    count = (tree.queries - first).clamp(max=size)
    at = first + (count - 1) // 2  # the query in the middle stands for all of its block
    candidates, _, taken = _chosen(gists[:, at], tails[:, at], budget[:, at], count.double() * heads, children)
    mean = lambda x: float(x.mean()) if tree.queries else 0.0
    return Recalling(
        queries=tree.queries,
        scored=mean(scored.sum(0)),
        read=mean(read),
        gists=int(tree.others.segment_start[0, levels]),
        blocks=len(first),
        items=float(taken.sum()),
        places=float(taken[-1].sum()) * (1 + children[-1]),
        chosen=float((budget[-1] * heads).minimum(gists[-1]).sum()),
        candidates=tuple(candidates.sum(1).tolist()),
        words=-(-size * heads // 32),
        tree=tree.child_lo.numel() * 3 * INT32 + tree.queries * (INT32 * (3 * levels + 5) + INT64),
        rows=tree.others.rows.shape[1],
        pairs=float(read.sum()) - seen,
    )


def wanted(tree: GistTree, config: GistConfig, group: int, heads: int) -> float:
    """Part of the chunks that any query of a rank selects, with so many query heads in all."""
    rule = select_rule(config)
    gists = (tree.hi[tree.levels - 1] - tree.lo[tree.levels - 1]).double().clamp(min=1)
    budget = rule.budget(tree.span, gists, group).double().minimum(gists)
    draws = tree.queries * (heads if rule.share == "head" else heads // group)
    return 1 - (1 - float((budget / gists).mean())) ** draws if tree.queries else 0.0


def raw_before(layout: Layout, tree: GistTree) -> float:
    """Raw tokens before a recalling query, itself included: the mean."""
    return float(layout.text.cumsum(1).flatten()[tree.tokens].double().mean()) if tree.queries else 0.0


def gists_seen(layout: Layout, tree: GistTree) -> int:
    """Gists that the recalling queries see while forgetting, summed."""
    seen = (layout.intervals.hi - layout.intervals.lo)[:, : tree.levels].sum(1, dtype=torch.int64)
    return int(seen.flatten()[tree.tokens].sum())


def raw_missing(layout: Layout, plan: RecallPlan) -> int:
    """Raw tokens that a rank does not have before it asks for chunks."""
    return int((layout.text & ~plan.kept.mask).sum())


def _chosen(gists: Tensor, tails: Tensor, budget: Tensor, draws: Tensor, children: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """What selections by chance take together, of some queries each.

    Args:
        gists, tails, budget: [L, n] per segment the gists before a query, those of them that need no selected parent, and how
            many it selects.
        draws: [n] selections.
        children: behind a gist of each segment.

    Returns:
        [L, n] gists that are scored, [n] rows that are read, [L, n] gists that are taken.
    """
    scored, taken = [gists[0]], []
    alike = [(gists[0], budget[0] / gists[0].clamp(min=1))]  # gists that a selection takes with the same probability
    for s in range(len(gists)):
        if s:
            candidates = sum(count * part for count, part in alike) * children[s - 1] + tails[s]
            part = (budget[s] / candidates.clamp(min=1)).clamp(max=1)
            alike = [(count * children[s - 1], above * part) for count, above in alike] + [(tails[s], part)]
            scored.append(taken[-1] * children[s - 1] + tails[s])
        taken.append(sum(count * (1 - (1 - part) ** draws) for count, part in alike))
    return torch.stack(scored), sum(taken) + taken[-1] * children[-1], torch.stack(taken)


def block_rows(head_dim: int, element: int) -> int:
    """Rows of a block, queries times heads of a KV head, on a GPU of compute capability 9.0 (kernels/unfold/tiles.py)."""
    if element == 2:
        return 64 if 64 < head_dim <= 128 else 32
    return 32 if head_dim <= 64 else 16
