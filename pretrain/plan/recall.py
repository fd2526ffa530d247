"""What a layer does beyond forgetting where tokens recall: how many gists its queries select, and what room lists of them take.

Which gists are selected depends on the data; how many a query selects does not, and lists have room for as many as there may be
(kernels/select/room.py). How many rows are read, which is time, is reckoned as if every head of every query drew its gists by
chance, so that the heads of a query have least in common.
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
ITEM = 8  # bytes of a selected gist in a list: its row, and a bit for each query of the block
INT32, INT64 = 4, 8
UNIT = 16  # candidates of a list come in as many (kernels/select/kernels.py)
SCRATCH = 1 << 29  # bytes of scores that selection has at once (kernels/select/triton.py)
PLACES = 1 << 27  # places of chunks that there are at once (kernels/select/room.py)
SPREAD = 1 << 26  # bits of lists for gists above level 0 at once (kernels/unfold/turn.py)
TALLIES = 64  # groups of blocks in which the queries of a chunk are counted (there)
PART = 512  # queries of a chunk from which on it is cut into parts (there)


@dataclass(frozen=True)
class Recalling:
    """A recalling layer of one sample, on one rank: what its queries score, select and read. Lists are those of one KV head.

    Attributes:
        queries: that select.
        scored, read: gists scored, and gists and raw tokens attended to, by a query and the query heads of a KV head: means.
        gists: of all levels.
        blocks: of queries.
        heads: rows of a block.
        items: room for selected gists in all lists.
        places: room for the chunks in all lists: a gist and the raw tokens behind it each.
        entries: (query, chunk) pairs in them, at most.
        candidates: most of a list, over all levels.
        chunks: gists of level 0.
        longest: keys of a chunk, a power of two.
        levels: of gists.
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
    heads: int
    items: float
    places: float
    entries: float
    candidates: int
    chunks: float
    longest: int
    levels: int
    tree: int
    rows: int
    pairs: float
    fetched: int = 0
    part: float = 1.0
    routed: float = 0.0

    def divided(self, ranks: int) -> Recalling:
        """With heads spread over so many ranks: an equal share of what each head has."""
        names = ("queries", "blocks", "items", "places", "entries", "gists", "chunks")
        return replace(self, **{name: getattr(self, name) / ranks for name in names})

    def lists(self) -> float:
        """Bytes of the lists that are kept for backward, of one KV head."""
        return ITEM * self.items + self.blocks * (INT64 * (self.levels + 1) + INT32 * 2 * (self.levels + 1))

    def selecting(self, kv_heads: int) -> float:
        """Most bytes that selection has at once beside the lists: scores, and candidates with who may take them."""
        scores = min(SCRATCH, INT32 * self.heads * self.candidates * self.blocks * kv_heads)
        below = (self.levels - 1) * (1 + -(-self.heads // 32)) / self.heads
        return scores * (1 + below)

    def spread(self, kv_heads: int) -> float:
        """Bytes of a table of all places of the chunks, as far as there are at once."""
        return 2 * INT32 * min(PLACES, self.places * kv_heads)

    def turning(self, kv_heads: int) -> float:
        """Bytes that lists take in backward beside themselves: queries of each chunk, how many they are, and the bits of upper
        gists or the places."""
        counted = (INT32 * (min(TALLIES, self.blocks) + 1) + INT64) * self.chunks
        upper = INT32 * min(SPREAD, self.blocks * kv_heads * (self.gists - self.chunks))
        return kv_heads * (counted + INT32 * self.entries) + max(upper, self.spread(kv_heads))

    def parts(self, kv_heads: int) -> float:
        """Keys of which there are partial sums in backward, of all KV heads."""
        return min(self.rows * kv_heads, 2 * self.entries * kv_heads / PART * self.longest)


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
    rule_budget = torch.stack([rule.budget(tree.span, n, group) for n in before]).double()
    budget = rule_budget.minimum(gists)
    for s in range(1, levels):  # a head chooses among children of what it has chosen
        budget[s] = budget[s].minimum(budget[s - 1] * children[s - 1] + tails[s])
    scored, read, _ = _chosen(gists, tails, budget, torch.full_like(gists[0], heads), children)

    size = max(1, min(BITS, rows // group))
    first = torch.arange(0, tree.queries, size)
    at = (first[:, None] + torch.arange(size)).clamp(max=tree.queries - 1)  # [blocks, size]
    real = first[:, None] + torch.arange(size) < tree.queries
    spanned = gists[:, at].amax(-1)  # the last query of a block has all gists that any of it has
    items = (rule_budget.minimum(gists)[:, at] * real).sum(-1).mul(heads).minimum(spanned)
    tail = _tail(tree, at, levels)
    candidates = [spanned[0]]
    for s in range(1, levels):
        candidates.append((items[s - 1] * children[s - 1] + tail[s]).minimum(spanned[s]))
    most = max(int(c.max()) for c in candidates) if tree.queries else 0
    entries = (rule_budget[-1].minimum(gists[-1]) * heads).minimum(gists[-1])
    mean = lambda x: float(x.mean()) if tree.queries else 0.0
    starts = tree.others.segment_start[0]
    return Recalling(
        queries=tree.queries,
        scored=mean(scored.sum(0)),
        read=mean(read),
        gists=int(starts[levels]),
        blocks=len(first),
        heads=max(16, 1 << (size * heads - 1).bit_length()),
        items=float(items.sum()),
        places=float((items[-1] * (1 + children[-1])).sum()),
        entries=float(entries.sum()),
        candidates=-(-most // UNIT) * UNIT,
        chunks=int(starts[levels] - starts[levels - 1]),
        longest=max(16, 1 << int(children[-1]).bit_length()),
        levels=levels,
        tree=tree.child_lo.numel() * 3 * INT32 + tree.queries * (INT32 * (3 * levels + 5) + INT64),
        rows=tree.others.rows.shape[1],
        pairs=float(read.sum()) - seen,
    )


def _tail(tree: GistTree, at: Tensor, levels: int) -> Tensor:
    """[L, blocks], gists that need no selected parent, of any query of a block. at: [blocks, size] queries."""
    return (tree.hi[:levels][:, at].amax(-1) - tree.tail[:, at].amin(-1)).double()


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


def raw_missing(plan: RecallPlan) -> int:
    """Raw tokens that a rank does not have before it asks for chunks."""
    return 0 if plan.lacks is None else len(plan.lacks.arrive)


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
