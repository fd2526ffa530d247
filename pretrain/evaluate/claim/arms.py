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


# Up to so many interleaved tokens a dense mask is the fastest way to forget: thousands of tiny documents, no long one.
SHORT = 160


@dataclass(frozen=True)
class GistArm:
    """Attention of an arm with gists, an :data:`model.attention.Attend`.

    RANDOM and RECENT select without looking at the keys: the scores of the rule are taken from stand-ins for queries and
    keys, so that budget, levels and what a chunk costs are exactly those of recall.

    Attributes:
        arm: one of BRANCHES. RANDOM: every gist scores a draw of its own for every query and head; RECENT: later gists
            score higher.
        draw: for RANDOM.
    """

    arm: str
    batch: MicroBatch
    draw: torch.Generator

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        recall = self.batch.recall
        backend = "reference" if k.shape[1] <= SHORT else None
        if index == 0 or self.arm == GISTS:
            return compressed_attention(q, k, v, self.batch.layout.intervals, backend=backend)
        tree = recall.tree
        out = compressed_attention(q, k, v, tree.others, backend=backend)
        recalling = q.flatten(0, 1).index_select(0, tree.tokens)  # [N, H, D]
        selection = select_gists(*self._scored(recalling, k), tree, recall.rule)
        recall.stats[index] = recall_stats(tree, selection)
        rows = unfold_attention(recalling, k, v, tree, selection)
        return out.flatten(0, 1).index_copy(0, tree.tokens, rows).view_as(q)

    def _scored(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [N, H, D] and keys [B, T, Hkv, D] whose products are the scores."""
        if self.arm == RECALL:
            return q, k
        if self.arm == RANDOM:
            return torch.randn(q.shape, generator=self.draw), torch.randn(k.shape, generator=self.draw)
        queries, keys = torch.zeros_like(q), torch.zeros_like(k)
        queries[..., 0] = 1
        keys[..., 0] = torch.arange(k.shape[1], dtype=k.dtype)[:, None]
        return queries, keys


def hidden(model: Transformer, arm: str, batch: MicroBatch, draw: torch.Generator) -> Tensor:
    """[T, B, hidden] after the final norm, as the arm attends."""
    attend = MicroBatchAttention(DENSE, batch.layout) if arm == DENSE else GistArm(arm, batch, draw)
    return model.run_layers(batch.ids, batch.layout.position, attend)


def loss_sum(model: Transformer, arm: str, batch: MicroBatch, draw: torch.Generator) -> Tensor:
    """Sum of the answers' cross-entropies, scalar."""
    return token_loss_sum(hidden(model, arm, batch, draw), batch.labels, model.head_weight, model.build)
