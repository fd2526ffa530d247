"""The gist tree of a micro-batch: what lies behind each gist, and where the recalling queries start (docs/method.md#recall).

Everything is read off the layout's intervals: the end of a token's range in a segment is a running count of that segment's
items, wherever the token sees the segment. Built only when something recalls; forgetting alone never pays for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unfold.kernels.common.plans import moved, to_device
from unfold.kernels.intervals import Intervals
from unfold.kernels.route import Routed
from unfold.kernels.select import SelectRule
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold import ListStats, RecallStats
from unfold.model.config import GistConfig
from unfold.model.gist.layout import Layout
from unfold.model.gist.routing import Routing

# What a raw token does beyond forgetting, as bits: it unfolds what it selects; in place of that, everything; it is taken for the
# routing loss.
RECALLS, UNFOLDS_ALL, ROUTES = 1, 2, 4


@dataclass(frozen=True)
class _Mixed:
    """What a layer's recalling queries read of which ``part`` unfolds everything; worked out when it is asked for."""

    chosen: RecallStats | ListStats
    everything: RecallStats
    part: float

    @property
    def unfolded(self) -> Tensor:
        return self.chosen.unfolded + self.part * (self.everything.unfolded - self.chosen.unfolded)

    @property
    def selected(self) -> Tensor:
        return self.chosen.selected + self.part * (self.everything.selected - self.chosen.selected)


@dataclass(frozen=True)
class Recall:
    """What the layers need to unfold chunks in a micro-batch.

    Attributes:
        tree: what lies behind each gist, and the recalling queries; those that unfold everything are not among them, they see
            it as rows of ``tree.others``.
        rule: budget and sharing of the selection.
        first_layer: the first layer in which they recall, ``recall_from`` of the configuration.
        flags: int32 [B, T], RECALLS, UNFOLDS_ALL and ROUTES of every recalling token, 0 of others; None where nobody will ask.
        wide: how many tokens unfold everything, and what they read in each layer; None where none does.
        routing: whose queries are to find what their layer's dense attention looks at; None where no loss is taken.
        stats: what each layer read, by its index; filled by the forward pass.
    """

    tree: GistTree
    rule: SelectRule
    first_layer: int = 1
    flags: Tensor | None = None
    wide: tuple[int, RecallStats] | None = None
    routing: Routing | None = None
    stats: dict[int, RecallStats | ListStats | _Mixed] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, layout: Layout, config: GistConfig, suffix: Tensor | None = None) -> Recall | None:
        """For a micro-batch; None when no token of it recalls. suffix: see :func:`recalling_tokens`."""
        if config.recall == "none":
            return None
        recalls = recalling_tokens(layout, config, suffix)
        return cls.from_flags(layout, config, recalls.int() * (RECALLS | UNFOLDS_ALL * config.unfold_all))

    @classmethod
    def from_flags(
        cls,
        layout: Layout,
        config: GistConfig,
        flags: Tensor,
        route_scale: float = 0.0,
        samples: Sequence[GistConfig] = (),
    ) -> Recall | None:
        """For a micro-batch of which every token says what it does; None when no token recalls.

        Args:
            layout: of the micro-batch.
            config: its chunk sizes, sink, budget and sharing.
            flags: int [B, T]; those of gists, links and padding are passed over.
            route_scale: see :class:`Routing`.
            samples: the settings of each sample where their chunk sizes differ; ``config`` has as many levels as any of them.
        """
        recalls = (flags & RECALLS > 0) & layout.text
        if not recalls.any():
            return None
        wide, routed = recalls & (flags & UNFOLDS_ALL > 0), recalls & (flags & ROUTES > 0)
        tree = build_recall(layout, config, recalls & ~wide)
        rule = select_rule(config)
        if samples:
            tree, rule = _own_budgets(tree, rule, samples, flags.shape[1])
        unfolding = None
        if wide.any():
            unfolding = int(wide.sum()), _read_by(layout, wide)
            tree = replace(tree, others=_widened(layout, tree.others, wide))
        routing = None
        if routed.any():
            first = first_rows(layout)[:, -1].flatten()
            queries = replace(build_recall(layout, config, routed), others=tree.others)  # of which the rows alone count
            routing = Routing(Routed(queries, first[queries.tokens].int()), config.route_far, route_scale)
        return cls(tree, rule, config.recall_from, flags.int() * recalls, unfolding, routing)

    @property
    def queries(self) -> int:
        """Tokens that recall."""
        return self.tree.queries + (self.wide[0] if self.wide else 0)

    def weighing(self, route_scale: float) -> Recall:
        """The same for one pass, whose routing losses weigh so much: no layer has read anything yet."""
        return replace(self, routing=self.routing and replace(self.routing, scale=route_scale, losses={}), stats={})

    def note(self, index: int, read: RecallStats | ListStats) -> None:
        """Keep what a layer's selecting queries read, together with those that unfold everything."""
        self.stats[index] = read if self.wide is None else _Mixed(read, self.wide[1], self.wide[0] / self.queries)

    def read(self) -> Tensor | None:
        """What the layers read since, on their device: float64 [2], raw tokens and gists summed over queries and layers.

        None: no layer recalled.
        """
        if not self.stats:
            return None
        read = list(self.stats.values())
        if all(isinstance(r, ListStats) for r in read):  # a few operations for all layers together
            unfolded, selected = ListStats.sums(read)
            return self.queries * torch.stack([unfolded.double(), selected.double().sum()])
        unfolded, selected = torch.stack([r.unfolded for r in read]), torch.stack([r.selected for r in read])
        return self.queries * torch.stack([unfolded.double().sum(), selected.double().sum()])

    def to(self, device: torch.device | str) -> Recall:
        """The same on another device."""
        routing = self.routing and self.routing.to(device)
        flags = None if self.flags is None else to_device(self.flags, device)
        return replace(self, tree=self.tree.to(device), flags=flags, wide=moved(self.wide, device), routing=routing)


def recalling_tokens(layout: Layout, config: GistConfig, suffix: Tensor | None = None) -> Tensor:
    """Which tokens recall under ``config.recall``: bool [B, T].

    Args:
        layout: of the micro-batch.
        config: ``recall`` is 'none' (no token), 'suffix' (the raw tokens of ``suffix``) or 'all' (every raw token).
            Links never do.
        suffix: bool [B, T], the tokens after the closed context; needed for 'suffix' only.

    Raises:
        ValueError: recall is 'suffix' and no suffix was given.
    """
    raw = layout.text
    if config.recall == "none":
        return torch.zeros_like(raw)
    if config.recall == "all":
        return raw
    if suffix is None:
        raise ValueError("recall: 'suffix' needs to know which tokens follow the closed context; give suffix, bool [B, T]")
    return raw & suffix


def select_rule(config: GistConfig) -> SelectRule:
    """The selection rule that a configuration describes."""
    return SelectRule(
        ratio=config.budget_ratio or config.ratio,
        chunk=config.chunk_sizes[0],
        topk=config.topk,
        top_p=config.top_p,
        share=config.share,
        everything=config.unfold_all,
    )


def _own_budgets(tree: GistTree, rule: SelectRule, samples: Sequence[GistConfig], tokens: int) -> tuple[GistTree, SelectRule]:
    """Adaptive budgets by each sample's own ratio and chunks.

    A query's span is divided by its sample's part of the divisor beforehand, and the rule's part becomes 1: dividing by both, one
    after the other, gives what dividing by their product does.
    """
    rules = [select_rule(config) for config in samples]
    divisor = torch.tensor([own.ratio * own.chunk for own in rules], dtype=tree.span.dtype, device=tree.span.device)
    span = tree.span // divisor[tree.tokens // tokens]
    return replace(tree, span=span), replace(rule, ratio=1, chunk=1)


def build_recall(layout: Layout, config: GistConfig, recalls: Tensor) -> GistTree:
    """Derive the gist tree of a micro-batch and the ranges of its recalling queries.

    Args:
        layout: of the micro-batch, made with the same ``config``.
        config: chunk sizes (their number is the number of levels) and sink.
        recalls: bool [B, T], the tokens that recall. Gists, links and padding never do, whatever is set for them.

    Returns:
        The tree, on the layout's device.

    Raises:
        ValueError: ``recalls`` has another shape than the layout.
    """
    if recalls.shape != layout.level.shape or recalls.dtype != torch.bool:
        raise ValueError(
            f"recalls: {recalls.dtype} {tuple(recalls.shape)}, expected torch.bool {tuple(layout.level.shape)} like the layout"
        )
    intervals, levels = layout.intervals, config.levels
    tokens = recalls.shape[1]
    recalls = recalls & layout.text
    first = first_rows(layout)
    families = intervals.memo("families", lambda: _families(layout, intervals.hi[:, : levels + 1], first, config.sink))
    child_lo, child_hi, parent = families

    query = recalls.flatten().nonzero()[:, 0]  # [N]
    at = lambda x: x.transpose(0, 1).flatten(1).index_select(1, query)  # [B, S, T] -> [S, N]
    lo, hi = at(intervals.lo), at(intervals.hi)
    lo[:levels] = at(first[:, :levels])
    tail = _open_tails(lo, hi, child_hi, query // tokens, levels)
    span = torch.arange(tokens, device=query.device) - layout.first_seen + 1
    splits = torch.nn.functional.pad(recalls.sum(1).cumsum(0), (1, 0)).tolist()
    others = intervals.without(recalls)
    span = span.flatten().index_select(0, query).int()
    return GistTree(others, child_lo, child_hi, parent, query, tuple(splits), lo, hi, tail, span)


def first_rows(layout: Layout) -> Tensor:
    """Of every segment but the sinks' the first row of a token's document, part or bundle: int32 [B, L + 1, T]."""
    return layout.intervals.memo("first rows", lambda: _find_first_rows(layout))


def _find_first_rows(layout: Layout) -> Tensor:
    start = layout.first_seen
    # It is raw and stands before all gists that the token could see: the ends of its ranges are
    # the first rows, but for the raw segment, whose range holds the token itself.
    ends = layout.intervals.hi[:, :-1]
    first = ends.gather(2, start[:, None].expand(-1, ends.shape[1], -1))
    first[:, -1] -= 1
    return first


def _read_by(layout: Layout, wide: Tensor) -> RecallStats:
    """What tokens read, in the mean, that unfold everything: beyond their window and the sinks, and gists."""
    lo, hi = layout.intervals.lo, layout.intervals.hi
    before = lo[:, -2] - first_rows(layout)[:, -1] - (hi[:, -1] - lo[:, -1])  # raw tokens that are in neither
    gists = hi[:, :-2] - first_rows(layout)[:, :-1]
    mean = lambda x: x[wide].float().mean()
    return RecallStats(mean(before), torch.stack([mean(x) for x in gists.flip(1).unbind(1)]))


def _widened(layout: Layout, others: Intervals, wide: Tensor) -> Intervals:
    """What the tokens of ``others`` see where those of ``wide``, bool [B, T], see all gists and raw tokens of their document."""
    lo, hi = others.lo.clone(), others.hi.clone()
    lo[:, :-1] = torch.where(wide[:, None], first_rows(layout), lo[:, :-1])
    lo[:, -1] = torch.where(wide, hi[:, -1], lo[:, -1])  # sinks are among the raw tokens
    return replace(others, lo=lo, hi=hi, plans={}, host=None)


def _families(layout: Layout, ends: Tensor, first: Tensor, sink: int) -> tuple[Tensor, Tensor, Tensor]:
    """Children ``[lo, hi)`` and parent of the item in each row, three [B, T] int32; ends, first: [B, L+1, T] by token."""
    intervals = layout.intervals
    levels = ends.shape[1] - 1
    tokens = ends.shape[2]
    rows = intervals.rows[:, :tokens]  # [B, T], the token in each row
    level, doc, home = (x.gather(1, rows).long() for x in (layout.level, layout.doc, layout.first_seen))
    segment = levels - 1 - level  # [B, T] by row
    pick = lambda x, s: x.transpose(1, 2).gather(1, rows[..., None].expand(-1, -1, levels + 1)).gather(2, s[..., None])[..., 0]

    below = (segment + 1).clamp_(max=levels)
    # A gist sees the segment below, up to itself: its children are what came since its elder sibling.
    child_hi = pick(ends, below)
    own_first = pick(first, below)
    elder = torch.zeros_like(home, dtype=torch.bool)
    elder[:, 1:] = (home[:, 1:] == home[:, :-1]) & (segment[:, 1:] == segment[:, :-1])
    child_lo = torch.where(elder, child_hi.roll(1, 1), own_first)
    child_lo = torch.where(level == 0, torch.maximum(child_lo, own_first + sink).minimum(child_hi), child_lo)
    is_gist = level >= 0
    child_lo, child_hi = child_lo * is_gist, child_hi * is_gist

    # The next gist one level up closes the item, if it is of the same document or part.
    parent = pick(ends, (segment - 1).clamp_(min=0))
    in_row = parent.clamp(max=tokens - 1).long()
    has_parent = (segment > 0) & (segment.gather(1, in_row) == segment - 1) & (home.gather(1, in_row) == home) & (doc >= 0)
    return child_lo, child_hi, parent.masked_fill(~has_parent, -1)


def _open_tails(lo: Tensor, hi: Tensor, child_hi: Tensor, sample: Tensor, levels: int) -> Tensor:
    """[L, N] int32: where the gists begin whose parent does not stand before the query. lo, hi: [S, N]; sample: [N]."""
    tail = lo[:levels].clone()
    for s in range(1, levels):
        last_parent = (hi[s - 1] - 1).clamp(min=0).long()
        behind = child_hi.flatten()[sample * child_hi.shape[1] + last_parent]
        tail[s] = torch.where(hi[s - 1] > lo[s - 1], behind, tail[s])
    return tail
