"""What is compared: dense attention, gists alone, recall, and recall that unfolds the wrong chunks at the same budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.compressed import compressed_attention
from kernels.select import select_gists
from kernels.unfold import unfold_attention
from kernels.unfold.op import recall_stats
from model.attention import MicroBatchAttention
from model.transformer import MicroBatch, Transformer, token_loss_sum

DENSE, GISTS, RECALL, RANDOM, RECENT = "dense", "gists", "recall", "random", "recent"
BRANCHES = (GISTS, RECALL, RANDOM, RECENT)  # what a model that has learned to forget goes on with


@dataclass(frozen=True)
class BlindRecall:
    """Recall whose selection does not look at the keys, an :data:`model.attention.Attend`.

    The scores of the rule are taken from stand-ins for queries and keys, so that budget, levels and what a chunk costs are
    exactly those of recall.

    Attributes:
        arm: RANDOM, every gist scores a draw of its own for every query and head; RECENT, later gists score higher.
        draw: for RANDOM.
    """

    arm: str
    batch: MicroBatch
    draw: torch.Generator

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        recall = self.batch.recall
        if index == 0:
            return compressed_attention(q, k, v, self.batch.layout.intervals)
        tree = recall.tree
        out = compressed_attention(q, k, v, tree.others)
        recalling = q.flatten(0, 1).index_select(0, tree.tokens)  # [N, H, D]
        selection = select_gists(*self._stand_ins(recalling, k), tree, recall.rule)
        recall.stats[index] = recall_stats(tree, selection)
        rows = unfold_attention(recalling, k, v, tree, selection)
        return out.flatten(0, 1).index_copy(0, tree.tokens, rows).view_as(q)

    def _stand_ins(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [N, H, D] and keys [B, T, Hkv, D] whose products are the scores."""
        if self.arm == RANDOM:
            return torch.randn(q.shape, generator=self.draw), torch.randn(k.shape, generator=self.draw)
        queries, keys = torch.zeros_like(q), torch.zeros_like(k)
        queries[..., 0] = 1
        keys[..., 0] = torch.arange(k.shape[1], dtype=k.dtype)[:, None]
        return queries, keys


def hidden(model: Transformer, arm: str, batch: MicroBatch, draw: torch.Generator) -> Tensor:
    """[T, B, hidden] after the final norm, as the arm attends."""
    if arm in (RANDOM, RECENT):
        attend = BlindRecall(arm, batch, draw)
    else:
        attend = MicroBatchAttention(DENSE if arm == DENSE else "gist", batch.layout, batch.recall if arm == RECALL else None)
    return model.run_layers(batch.ids, batch.layout.position, attend)


def loss_sum(model: Transformer, arm: str, batch: MicroBatch, draw: torch.Generator) -> Tensor:
    """Sum of the answers' cross-entropies, scalar."""
    return token_loss_sum(hidden(model, arm, batch, draw), batch.labels, model.head_weight, model.build)
