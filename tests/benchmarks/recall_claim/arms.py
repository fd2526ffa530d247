"""What is compared: dense attention, gists alone, recall, and recall that unfolds the wrong chunks at the same budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.kernels.select import select_gists
from unfold.kernels.select.selection import Selection
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold.op import recall_stats
from unfold.model.loss import token_loss_sum
from unfold.model.transformer import Transformer
from unfold.model.visibility import MicroBatch, MicroBatchAttention

DENSE, GISTS, RECALL, RANDOM, RECENT = "dense", "gists", "recall", "random", "recent"
BRANCHES = (GISTS, RECALL, RANDOM, RECENT)  # what a model that has learned to forget goes on with


@dataclass(frozen=True)
class GistArm:
    """Attention of an arm with gists in one micro-batch, an :data:`unfold.model.attention.Attend`.

    The contexts are a few hundred tokens long: masks over all keys are many times faster there than the kernels' plans, and say
    the same (a test holds them against recall as it is trained). The questions that recall end every sample.

    Attributes:
        arm: one of BRANCHES.
        batch: what it attends in.
        scored: queries [N, H, W] and keys [B, T, Hkv, W] whose products are the scores of the selection, in all layers;
            None: the layer's own. Budget, levels and what a chunk costs stay those of recall.
        made: masks and selections that all layers share.
    """

    arm: str
    batch: MicroBatch
    scored: tuple[Tensor, Tensor] | None = None
    made: dict[str, Any] = field(default_factory=dict, repr=False)

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
        forgets = self._once("mask", self.batch.layout.intervals.dense_mask)[:, None]  # [B, 1, T, T]
        if index == 0 or self.arm == GISTS:
            return masked_attention(q, k, v, forgets).transpose(1, 2)
        asked = q.shape[2] - self.batch.recall.tree.queries // len(q)
        selection = self._select(q[:, :, asked:].transpose(1, 2).flatten(0, 1), k.transpose(1, 2))
        self.batch.recall.stats[index] = recall_stats(self.batch.recall.tree, selection)
        unfolds = unfolded_mask(self.batch.recall.tree, selection)  # [N, Hkv, T]
        unfolds = unfolds.unflatten(0, (len(q), -1)).transpose(1, 2).repeat_interleave(q.shape[1] // k.shape[1], 1)
        parts = (q[:, :, :asked], forgets[:, :, :asked]), (q[:, :, asked:], unfolds)
        return torch.cat([masked_attention(part, k, v, mask) for part, mask in parts], 2).transpose(1, 2)

    def _select(self, recalling: Tensor, k: Tensor) -> Selection:
        select = lambda q, k: select_gists(q, k, self.batch.recall.tree, self.batch.recall.rule)
        return select(recalling, k) if self.scored is None else self._once("selection", lambda: select(*self.scored))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[B, H, queries, D] of softmax attention where ``mask``, bool [B, 1 or H, queries, T], allows it."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


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


def gist_arm(arm: str, batch: MicroBatch, heads: int, kv_heads: int, draw: torch.Generator) -> GistArm:
    """The attention of an arm. RANDOM: each query draws a score for every gist, once for all heads and layers, so that the
    chunks that it reads are as few as its budget says; RECENT: later gists score higher."""
    if arm not in (RANDOM, RECENT):
        return GistArm(arm, batch)
    samples, tokens = batch.ids.shape
    queries = batch.recall.tree.queries
    if arm == RANDOM:
        # Products of wide draws are as good as independent: no gist is the favourite of many queries.
        q, k = (torch.randn(*shape, 1, 32, generator=draw) for shape in ((queries,), (samples, tokens)))
    else:
        q, k = torch.ones(queries, 1, 1), torch.arange(tokens, dtype=torch.float32).expand(samples, tokens)[..., None, None]
    return GistArm(arm, batch, (q.repeat(1, heads, 1), k.repeat(1, 1, kv_heads, 1)))


def hidden(model: Transformer, arm: str, batch: MicroBatch, draw: torch.Generator) -> Tensor:
    """[T, B, hidden] after the final norm, as the arm attends."""
    if arm == DENSE:
        attend = MicroBatchAttention(DENSE, batch.layout)
    else:
        attend = gist_arm(arm, batch, model.config.heads, model.config.kv_heads, draw)
    return model.run_layers(batch.ids, batch.layout.position, attend)


def loss_sum(model: Transformer, arm: str, batch: MicroBatch, draw: torch.Generator) -> Tensor:
    """Sum of the answers' cross-entropies, scalar."""
    return token_loss_sum(hidden(model, arm, batch, draw), batch.labels, model.head_weight, model.build)
