"""Self-attention of one layer: over gists, with or without recall, or dense causal attention as the baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.compressed import compressed_attention
from kernels.unfold import recall_attention
from model.config import ModelConfig
from model.gist import Layout, Recall
from model.layers import BuildContext, Rotary


class Attention(nn.Module):
    """Grouped-query attention; heads are split over the tensor-parallel group by KV group."""

    def __init__(self, config: ModelConfig, build: BuildContext, index: int, residual_std: float):
        super().__init__()
        name = f"layers.{index}.attention"
        self.kind, self.index = config.attention, index
        self.head_dim = config.head_dim
        self.group = config.heads // config.kv_heads
        # Rows ordered [KV head, (its query heads, key, value), head_dim]: any tensor-parallel size splits them evenly.
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = build.column(f"{name}.qkv", config.hidden_size, width, config.init_std)
        self.output = build.row(f"{name}.output", config.heads * config.head_dim, config.hidden_size, residual_std)

    def forward(self, x: Tensor, layout: Layout, rotary: Rotary, recall: Recall | None) -> Tensor:
        """[T, B, hidden] -> [T, B, hidden]; recall: who unfolds what, None where nothing does."""
        tokens, batch, _ = x.shape
        qkv = self.qkv(x)[0].transpose(0, 1).reshape(batch, tokens, -1, self.group + 2, self.head_dim)
        q, k, v = qkv.split([self.group, 1, 1], 3)
        q = rotary.apply(q.flatten(2, 3))  # [B, T, H, D]
        k, v = rotary.apply(k.squeeze(3)), v.squeeze(3)  # [B, T, Hkv, D]
        if self.kind == "dense":
            out = dense_attention(q, k, v, layout)
        elif recall is None or self.index == 0:  # in the first layer gists hold nothing of their own yet
            out = compressed_attention(q, k, v, layout.intervals)
        else:
            out, recall.stats[self.index] = recall_attention(q, k, v, recall.tree, recall.rule)
        return self.output(out.flatten(2).transpose(0, 1).contiguous())[0]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention within each document, through PyTorch's SDPA (flash where it can): the baseline.

    Args and result as :func:`kernels.compressed.compressed_attention`; padding attends to nothing and gets zeros.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    out = torch.zeros_like(q)
    for sample, start, stop in layout.document_spans:
        part = [x[sample : sample + 1, :, start:stop] for x in (q, k, v)]
        out[sample, :, start:stop] = F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0]
    return out.transpose(1, 2)
