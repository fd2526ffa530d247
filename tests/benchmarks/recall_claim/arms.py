"""What is compared: dense attention, and ways of training a model with gists to look up, each the recipe or one part less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.recall_claim.sparse import sparse_routing_loss
from unfold.kernels.route import Routed, chunk_mass, routing_loss
from unfold.kernels.select import select_gists
from unfold.kernels.select.selection import Selection
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold.op import recall_stats
from unfold.model.config import GistConfig
from unfold.model.gist import recalls_in
from unfold.model.transformer import Transformer
from unfold.model.visibility import MicroBatch, MicroBatchAttention


@dataclass(frozen=True)
class Way:
    """One way of training with gists, and what the trained model selects.

    Attributes:
        label: in tables.
        recalls: whether questions recall at all.
        selects: the gists that a question unfolds: 'own' (those that score best, as the method has it), 'random', 'recent',
            'mass' (those with the largest mass of the layer's own dense attention: what routing could reach).
        from_start: recalls while it learns to forget, too.
        wide: everything is unfolded in contexts shorter than the whole one.
        always_wide: everything is unfolded, at the end too.
        route: weight of the routing loss in each layer that recalls.
        own_group: gists see their own group alone, where there are several levels.
        late: recall begins at the layer that is the number of levels, or at the last one.
        forget_every: every so many steps nothing recalls; 0: none.
        others: the routing loss's teacher reads the selected chunks alone and so many random ones, where not everything is
            unfolded; None: all.
    """

    label: str
    recalls: bool = True
    selects: str = "own"
    from_start: bool = False
    wide: bool = False
    always_wide: bool = False
    route: float = 0.0
    own_group: bool = False
    late: bool = False
    forget_every: int = 0
    others: int | None = None

    def gist(self, chunk_sizes: tuple[int, ...], layers: int) -> GistConfig:
        """Its settings for these chunk sizes, in a model of so many layers."""
        levels = len(chunk_sizes)
        first = min(levels, layers - 1) if self.late else 1
        return GistConfig(
            chunk_sizes,
            recall="suffix",
            own_group=self.own_group and levels > 1,
            recall_from=first,
            unfold_all=self.always_wide,
            route_loss=self.route * (layers - first),  # gist.route_loss weighs their mean
        )


DENSE = "dense"
RECIPE = Way("recall, taught to route", from_start=True, wide=True, route=1.0, own_group=True, late=True)
less = dataclasses.replace
WAYS = {
    "gists": Way("gists only", recalls=False),
    "recall": Way("recall, the paper's way"),
    "taught": RECIPE,
    "mixed": less(RECIPE, label="taught, every fourth step gists only", forget_every=4),
    "half": less(RECIPE, label="taught, every second step gists only", forget_every=2),
    "random": Way("random chunks", selects="random"),
    "recent": Way("the most recent chunks", selects="recent"),
    "no-loss": less(RECIPE, label="taught, without the loss", route=0.0),
    "no-start": less(RECIPE, label="taught, forgetting first", from_start=False, wide=False),
    "no-wide": less(RECIPE, label="taught, nothing unfolded whole", wide=False),
    "no-own-group": less(RECIPE, label="taught, without own_group", own_group=False),
    "no-late": less(RECIPE, label="taught, recall from layer 1", late=False),
    "sparse": less(RECIPE, label="taught by the selected chunks and 8 random ones", others=8),
    "mass": less(RECIPE, label="chosen by dense attention (bound)", selects="mass", route=0.0),
    "everything": less(RECIPE, label="everything unfolded (bound)", always_wide=True, route=0.0),
}
MAIN = ("gists", "recall", "taught", "mixed", "random", "recent")
PARTS = ("no-loss", "no-start", "no-wide", "no-own-group", "no-late", "sparse", "mass", "everything")


MASKED = 768  # tokens of a sample, gists included, up to which masks cost no more than the kernels' plans on a CPU


@dataclass
class GistArm:
    """Attention of a way in one micro-batch, an :data:`unfold.model.visibility.Attend`.

    Masks over all keys are faster in short contexts than the kernels' plans, and say the same (a test holds them against recall
    as it is trained). The questions that recall end every sample.

    Attributes:
        way, gist: how it attends.
        batch: what it attends in.
        scored: queries [N, H, W] and keys [B, T, Hkv, W] whose products are the scores of the selection, in all layers;
            None: the layer's own. Budget, levels and what a chunk costs stay those of recall.
        draw: what a sparse teacher's chunks are drawn by.
        made: masks and selections that all layers share.
        routed: sums of the layers' routing losses, over queries and heads.
    """

    way: Way
    gist: GistConfig
    batch: MicroBatch
    scored: tuple[Tensor, Tensor] | None = None
    draw: torch.Generator | None = None
    made: dict[str, Any] = field(default_factory=dict, repr=False)
    routed: list[Tensor] = field(default_factory=list, repr=False)

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        recall = self.batch.recall
        if recall is None or not recalls_in(index, self.gist.recall_from):
            return self._masked("forgetting", self.batch.layout.intervals, q, k, v)
        routing = recall.routing
        whole = self.way.others is None or not recall.tree.queries
        if whole and routing is not None and torch.is_grad_enabled():
            asking = q.detach().flatten(0, 1)[routing.routed.tree.tokens]
            self.routed.append(routing_loss(asking, k, routing.routed, far=routing.far))
        if not recall.tree.queries:  # all questions unfold everything
            return self._masked("wide", recall.tree.others, q, k, v)
        asked = q.shape[1] - recall.tree.queries // len(q)
        recalling = q[:, asked:].flatten(0, 1)
        selection = self._select(recalling, k)
        if not whole and routing is not None and torch.is_grad_enabled():
            given = recalling.detach(), k, self._routed(), selection, self.way.others, self.draw
            self.routed.append(sparse_routing_loss(*given))
        recall.note(index, recall_stats(recall.tree, selection))
        unfolds = unfolded_mask(recall.tree, selection)  # [N, Hkv, T]
        unfolds = unfolds.unflatten(0, (len(q), -1)).transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], 1)
        forgets = self._mask("forgetting", self.batch.layout.intervals)[:, :, :asked]
        parts = (q[:, :asked], forgets), (q[:, asked:], unfolds)
        return torch.cat([masked_attention(part, k, v, mask) for part, mask in parts], 1)

    def _masked(self, name: str, intervals, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, self._mask(name, intervals))

    def _mask(self, name: str, intervals) -> Tensor:
        """[B, 1, T, T]"""
        return self._once(name, intervals.dense_mask)[:, None]

    def _select(self, recalling: Tensor, k: Tensor) -> Selection:
        tree, rule = self.batch.recall.tree, self.batch.recall.rule
        if self.way.selects == "mass":
            return select_gists(*mass_scores(recalling.detach(), k.detach(), self._routed()), tree, rule)
        if self.scored is None:
            return select_gists(recalling, k, tree, rule)
        return self._once("selection", lambda: select_gists(*self.scored, tree, rule))

    def _routed(self) -> Routed:
        tree, layout = self.batch.recall.tree, self.batch.layout
        first = torch.zeros_like(tree.span) + layout.intervals.segment_start[0, tree.levels]  # one document per sample
        return self._once("routed", lambda: Routed(tree, first.int()))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, n, H, D], k, v [B, T, Hkv, D] -> [B, n, H, D] of softmax attention where mask, bool [B, 1 or H, n, T], allows it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def unfolded_mask(tree: GistTree, selection: Selection) -> Tensor:
    """What the recalling queries see, bool [N, Hkv, T]: window, sinks, selected gists and the chunks behind those of level 0."""
    rows, heads = tree.others.rows, selection.kv_heads
    sample = (tree.tokens // tree.others.tokens).repeat_interleave(heads)  # [N * Hkv]
    lists = torch.arange(len(sample))
    ranges = [(lists, *(x[s].repeat_interleave(heads) for x in (tree.lo, tree.hi))) for s in (tree.levels, tree.levels + 1)]
    for chosen, start in zip(selection.rows, selection.start):
        owner = lists.repeat_interleave(start.diff())
        ranges.append((owner, chosen, chosen + 1))
    ranges.append((owner, tree.child_lo[sample[owner], chosen.long()], tree.child_hi[sample[owner], chosen.long()]))
    steps = torch.zeros(len(sample), rows.shape[1] + 1, dtype=torch.int32)  # +1 where a range begins, -1 where it ends
    for owner, lo, hi in ranges:
        for place, step in ((lo, 1), (hi, -1)):
            steps.index_put_((owner, place.long()), torch.tensor(step, dtype=torch.int32), accumulate=True)
    seen = torch.zeros(len(sample), tree.others.tokens, dtype=torch.int32)
    seen.scatter_add_(1, rows[sample], (steps.cumsum(1)[:, :-1] > 0).int())
    return (seen > 0).unflatten(0, (-1, heads))


def mass_scores(q: Tensor, k: Tensor, routed: Routed) -> tuple[Tensor, Tensor]:
    """Queries [N, H, G] and keys [B, T, Hkv, G] whose products are the mass of dense attention behind each of the G gists."""
    tree = routed.tree
    gists = int(tree.others.segment_start[:, tree.levels].max())
    scores = q.new_zeros(len(q), q.shape[1], gists)
    for block in chunk_mass(q, k, routed):
        for first, mass in zip(block.first, block.mass):
            scores[block.queries, :, first : first + mass.shape[2]] = mass.to(q.dtype)
    one_hot = torch.zeros(*k.shape[:2], 1, gists, dtype=q.dtype)
    row = tree.others.row_of
    samples, tokens = (row < gists).nonzero(as_tuple=True)
    one_hot[samples, tokens, 0, row[samples, tokens]] = 1
    return scores, one_hot.expand(-1, -1, k.shape[2], -1).contiguous()


def gist_arm(
    way: Way, gist: GistConfig, batch: MicroBatch, heads: int, kv_heads: int, draw: torch.Generator
) -> GistArm | MicroBatchAttention:
    """The attention of a way: that of training in long samples, if it selects as in training; by masks otherwise.

    Random: each query draws a score for every gist, once for all heads and layers, so that the chunks that it reads are as few
    as its budget says; recent: later gists score higher.
    """
    if way.selects == "own" and way.others is None and batch.ids.shape[1] > MASKED:
        return MicroBatchAttention("gist", batch.layout, batch.recall)
    if way.selects not in ("random", "recent") or batch.recall is None:
        return GistArm(way, gist, batch, draw=draw)
    samples, tokens = batch.ids.shape
    queries = batch.recall.tree.queries
    if way.selects == "random":
        # Products of wide draws are as good as independent: no gist is the favourite of many queries.
        q, k = (torch.randn(*shape, 1, 32, generator=draw) for shape in ((queries,), (samples, tokens)))
    else:
        q, k = torch.ones(queries, 1, 1), torch.arange(tokens, dtype=torch.float32).expand(samples, tokens)[..., None, None]
    return GistArm(way, gist, batch, (q.repeat(1, heads, 1), k.repeat(1, 1, kv_heads, 1)))


def dense_arm(batch: MicroBatch) -> MicroBatchAttention:
    """Dense attention over raw tokens."""
    return MicroBatchAttention(DENSE, batch.layout)


def states(model: Transformer, attend, batch: MicroBatch) -> Tensor:
    """[T, B, hidden] after the final norm."""
    return model.run_layers(batch.ids, batch.layout.position, attend)
