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
    """Attention of an arm with gists in one micro-batch, an :data:`model.attention.Attend`.

    Attributes:
        arm: one of BRANCHES.
        batch: what it attends in.
        scored: queries [N, H, W] and keys [B, T, Hkv, W] whose products are the scores of the selection, in all layers;
            None: the layer's own. Budget, levels and what a chunk costs stay those of recall.
    """

    arm: str
    batch: MicroBatch
    scored: tuple[Tensor, Tensor] | None = None

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        recall = self.batch.recall
        backend = "reference" if k.shape[1] <= SHORT else None
        if index == 0 or self.arm == GISTS:
            return compressed_attention(q, k, v, self.batch.layout.intervals, backend=backend)
        tree = recall.tree
        out = compressed_attention(q, k, v, tree.others, backend=backend)
        recalling = q.flatten(0, 1).index_select(0, tree.tokens)  # [N, H, D]
        selection = select_gists(*(self.scored or (recalling, k)), tree, recall.rule)
        recall.stats[index] = recall_stats(tree, selection)
        rows = unfold_attention(recalling, k, v, tree, selection)
        return out.flatten(0, 1).index_copy(0, tree.tokens, rows).view_as(q)


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
