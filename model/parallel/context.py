"""One sequence over several ranks: each holds a part of every interleaved sample (:mod:`unfold.model.parallel.division`).

Ranks that exchange *gists* send what the method lets others see and nothing else: gists, sinks and the raw tokens of the last
chunks before a slice. Each gathers these keys and values once per layer (one differentiable all-gather), puts them before
its own and attends over that short sequence with the ordinary operation, whose ranges are mapped row by row; so it is
exact by construction. Recall adds the chunks that are selected (:mod:`unfold.model.parallel.recall`). Ranks that trade *heads*
(DeepSpeed-Ulysses) share one such part, or the whole sequence where no gists are exchanged: for attention each has all
tokens of it, of some of the heads, and anything runs unchanged on them. Both go together: neighbours of a node trade heads,
and the ranks that have the same heads of different parts exchange the gists of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unfold.kernels.route import Routed
from unfold.kernels.tree import GistTree
from unfold.model.gist import Layout, Recall, recalls_in
from unfold.model.kinds import Kinds, kind_of
from unfold.model.parallel.division import Division
from unfold.model.parallel.recall import RecallPlan, make_recall_plan, prepare_over_ranks, select_over_ranks
from unfold.model.parallel.route import RankPlan, rank_plan, routing_loss_over_ranks
from unfold.model.parallel.rows import Exports, Kept, had, seen_by, take
from unfold.model.parallel.tensor import Group, gather_sequence


@dataclass
class ContextTraffic:
    """What a rank sent in forward passes (recomputed ones too) since it was last taken.

    Attributes:
        exchanges: of gists: attentions of a layer and micro-batch.
        sent: bytes of keys and values in them, whose gradients take the way back, and of who asks for which chunks.
        whole: bytes that all-gathering the keys and values of every token would have sent in their place.
        trades: of the sequence for heads, as many attentions.
        traded: bytes of queries, keys, values and outputs in them.
    """

    exchanges: int = 0
    sent: int = 0
    whole: int = 0
    trades: int = 0
    traded: int = 0

    def take(self) -> ContextTraffic:
        """What was counted so far; it begins again at 0."""
        taken = replace(self)
        self.exchanges = self.sent = self.whole = self.trades = self.traded = 0
        return taken


@dataclass(frozen=True)
class ContextParallel:
    """How the sequence is spread over n ranks.

    Attributes:
        gists: the ranks that exchange gists, in the order of the parts; Alone() where none do.
        heads: the neighbours that trade the sequence for heads, each with an equal stretch of a part; Alone() where none do.
        kinds: of the layers.
        traffic: what was sent.
    """

    gists: Group
    heads: Group
    kinds: Kinds = "gist"
    traffic: ContextTraffic = field(default_factory=ContextTraffic, compare=False)

    @property
    def exchanges(self) -> bool:
        """Whether gists are exchanged: no rank has what all queries of a sample see."""
        return self.gists.size() > 1

    def of(self, layout: Layout) -> ContextPart:
        """This rank's part of a micro-batch."""
        size = self.gists.size()

        def divide(whole: Layout) -> Division:
            if size == 1:
                return Division.whole(whole.intervals.tokens)
            layers = [self.kinds] if isinstance(self.kinds, str) else self.kinds
            return Division.even([whole.in_layer(kind).intervals for kind in layers], size)

        return ContextPart(self, layout.planned(("division", size), divide))

    def gather(self, keys_values: Tensor, exports: Exports) -> Tensor:
        """Keys and values of this rank's part, of p, [B, T / p, 2 h, D], and after them all parts' exports [B, p E, 2 h, D]."""
        exported = take(keys_values, exports.exported)
        peers, traffic = self.gists.size() - 1, self.traffic
        traffic.exchanges += 1
        traffic.sent += peers * exported.numel() * exported.element_size()
        traffic.whole += peers * keys_values.numel() * keys_values.element_size()
        received = gather_sequence(exported[None], self.gists)  # [p, B, E, 2 h, D]
        return torch.cat([keys_values, received.transpose(0, 1).flatten(1, 2)], 1)


@dataclass(frozen=True)
class ContextPart:
    """This rank's part of a micro-batch: how it is spread, and which tokens are in each of the parts that exchange gists."""

    context: ContextParallel
    division: Division

    @property
    def rank(self) -> int:
        """Of the parts the one of this rank, and of those it trades heads with."""
        return self.context.gists.rank()

    def take(self, x: Tensor, dim: int) -> Tensor:
        """What this rank holds of a tensor that covers whole samples along ``dim``."""
        heads = self.context.heads
        return self.division.part(x, dim, self.rank).chunk(heads.size(), dim)[heads.rank()].contiguous()

    def plan(self, layout: Layout) -> ExchangePlan:
        """Who sends what in a micro-batch; made once, shared by its layers."""
        key = ("context parallel", self.division, self.rank)
        return layout.planned(key, lambda whole: make_plan(whole, self.division, self.rank))

    def recall_plan(self, tree: GistTree) -> RecallPlan:
        """The same for layers that recall."""
        key = ("context parallel recall", self.division, self.rank)
        return tree.planned(key, lambda whole: make_recall_plan(whole, self.division, self.rank))


@dataclass(frozen=True)
class ContextAttention:
    """Attention of this rank's queries over whole sequences that are spread over the ranks.

    Attributes:
        part: this rank's, of the samples.
        make: (layout, recall) -> attention (layer index, q, k, v) -> out among tokens that are all here; where keys are exchanged
            it is given layouts whose ranges are those of the layer's kind.
        layout, recall: of the whole samples, alike on all ranks.
        kinds: of the layers.
    """

    part: ContextPart
    make: Callable
    layout: Layout
    recall: Recall | None
    kinds: Kinds = "gist"

    def prepare(self, index: int, q: Tensor, k: Tensor, *, backward: bool = True) -> None:
        """As :meth:`unfold.model.visibility.MicroBatchAttention.prepare`; q, k: with the heads before any trade."""
        ranks, context = self.part.context.heads.size(), self.part.context
        q, k = (x.narrow(-2, 0, x.shape[-2] // ranks) for x in (q, k))
        if not context.exchanges:
            self.make(self.layout, self.recall).prepare(index, q, k, backward=backward)
            return
        recall = self._recall_in(index)
        if recall is None:
            plan = self.part.plan(self.layout.in_layer(kind_of(self.kinds, index)))
            self.make(plan.layout, None).prepare(index, q, k, backward=backward)
            return
        prepare_over_ranks(self.part.recall_plan(recall.tree), recall.rule, q, k)
        if recall.routing is not None:
            self._routing_plan(recall.routing.routed, q, k)

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T / n, H, D], k, v [B, T / n, Hkv, D] -> [B, T / n, H, D], all of what this rank holds."""
        heads, traffic = self.part.context.heads, self.part.context.traffic
        if heads.size() == 1:
            return self._among_parts(index, q, k, v)
        from deepspeed.sequence.layer import DistributedAttention

        traffic.trades += 1
        traffic.traded += (2 * q.numel() + k.numel() + v.numel()) * q.element_size() * (heads.size() - 1) // heads.size()
        return DistributedAttention(lambda *qkv: self._among_parts(index, *qkv), heads)(q, k, v, 0)

    def _among_parts(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same for a whole part, of p, and some heads: q [B, T / p, h, D], k, v [B, T / p, hkv, D] -> [B, T / p, h, D]."""
        context = self.part.context
        if not context.exchanges:
            return self.make(self.layout, self.recall)(index, q, k, v)
        keys_values = torch.cat([k, v], 2)  # [B, T / p, 2 hkv, D]
        recall = self._recall_in(index)
        if recall is not None:
            return self._with_recall(index, q, keys_values)
        plan = self.part.plan(self.layout.in_layer(kind_of(self.kinds, index)))
        pool = context.gather(keys_values, plan.exports)
        k_near, v_near = take(pool, plan.source).split(k.shape[2], 2)
        blank = q.new_zeros(q.shape[0], 1, *q.shape[2:])
        q_near = take(torch.cat([q, blank], 1), plan.query_source)
        out = self.make(plan.layout, None)(index, q_near, k_near.contiguous(), v_near.contiguous())
        return take(out, plan.own)

    def _recall_in(self, index: int) -> Recall | None:
        recall = self.recall
        return recall if recall is not None and recalls_in(index, recall.first_layer, kind_of(self.kinds, index)) else None

    def _routing_plan(self, routed: Routed, q: Tensor, k: Tensor) -> RankPlan:
        return rank_plan(routed, q.shape[-2] // k.shape[-2], self.part.division, self.part.rank, q.device)

    def _with_recall(self, index: int, q: Tensor, keys_values: Tensor) -> Tensor:
        context, recall = self.part.context, self.recall
        plan = self.part.recall_plan(recall.tree)
        pool = context.gather(keys_values, plan.exports)
        selected = select_over_ranks(plan, recall.rule, q, pool, context.gists)
        loss = self._routing_loss(q, keys_values)  # what it launches the GPU works through while sizes are on their way
        out, read, sent = selected.unfold()
        recall.note(index, read)
        context.traffic.sent += sent
        return out if loss is None else recall.routing.take(index, loss, out)

    def _routing_loss(self, q: Tensor, keys_values: Tensor) -> Tensor | None:
        """This rank's share in a layer that recalls; None where none is taken."""
        routing = self.recall.routing
        if routing is None or not torch.is_grad_enabled():
            return None
        k = keys_values[:, :, : keys_values.shape[2] // 2]
        mine = self._routing_plan(routing.routed, q, k).mine
        asking = q.detach().flatten(0, 1).index_select(0, mine)
        group = self.part.context.gists
        return routing_loss_over_ranks(asking, k, routing.routed, self.part.division, group, far=routing.far)


@dataclass(frozen=True)
class ExchangePlan:
    """What one rank sends and reads in a micro-batch. N is the length of the short sequence.

    Attributes:
        exports: what the ranks gather.
        source: [B, N] int64, where each token of the short sequence lies in (own part, then the n ranks' exports).
        query_source: [B, N] int64, the same for queries; others' tokens ask nothing and read a blank row.
        own: [B, T / n] int64, places of this rank's tokens in the short sequence.
        layout: intervals of the short sequence (its levels and positions are not used).
        tokens_held: of this rank per sample.
    """

    exports: Exports
    source: Tensor
    query_source: Tensor
    own: Tensor
    layout: Layout
    tokens_held: int


def make_plan(layout: Layout, division: Division, rank: int) -> ExchangePlan:
    """The plan of one rank; every rank derives it from the whole layout, so nothing needs to be negotiated."""
    intervals, homes = layout.intervals, division.homes(layout.device)
    seen = torch.stack([seen_by(intervals, homes.tokens_of(r)) for r in range(division.ranks)])
    exports = Exports.of(seen, homes, rank)
    kept = Kept.of(had(seen, homes)[rank], intervals, homes.tokens_of(rank))
    near = kept.near
    filled = torch.arange(kept.length, device=near.device) < kept.mask.sum(-1, keepdim=True)
    is_own = filled & (homes.rank[near] == rank)
    query_source = torch.where(is_own, homes.place[near], division.held)
    short = kept.intervals(intervals)
    near_layout = Layout(layout.level.gather(1, near), layout.doc.gather(1, near), layout.position.gather(1, near), short)
    return ExchangePlan(exports, exports.source.gather(1, near), query_source, kept.own, near_layout, division.held)
