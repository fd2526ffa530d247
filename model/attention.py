"""Self-attention of one layer. Who sees whom is not decided here: an :data:`Attend` is handed in, for a micro-batch in
training (:class:`MicroBatchAttention`), for tokens that are spread over ranks, or for new tokens before a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unfold.kernels.compressed import compressed_attention
from unfold.kernels.unfold import recall_attention
from unfold.model.config import ModelConfig
from unfold.model.gist import Layout, Recall
from unfold.model.layers import BuildContext, RMSNorm, Rotary

# (layer index, q [B, T, H, D], k [B, T, Hkv, D], v [B, T, Hkv, D]) -> [B, T, H, D]; rotary applied to q and k.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MicroBatchAttention:
    """Attention among the tokens of one micro-batch, as in training; an :data:`Attend`.

    Attributes:
        kind: 'gist' or 'dense'.
        layout: of the micro-batch.
        recall: who unfolds what, None where nothing does.
    """

    kind: str
    layout: Layout
    recall: Recall | None = None

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "dense":
            return dense_attention(q, k, v, self.layout)
        if self.recall is None or index == 0:  # in the first layer gists hold nothing of their own yet
            return compressed_attention(q, k, v, self.layout.intervals)
        out, self.recall.stats[index] = recall_attention(q, k, v, self.recall.tree, self.recall.rule)
        return out


class Attention(nn.Module):
    """Grouped-query attention; heads are split over the tensor-parallel group by KV group."""

    def __init__(self, config: ModelConfig, build: BuildContext, index: int, residual_std: float):
        super().__init__()
        name = f"layers.{index}.attention"
        self.index = index
        self.head_dim = config.head_dim
        self.group = config.heads // config.kv_heads
        self.rotates = index not in config.nope_layers
        # Rows ordered [KV head, (its query heads, key, value), head_dim]: any tensor-parallel size splits them evenly.
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = build.column(f"{name}.qkv", config.hidden_size, width, config.init_std, bias=config.qkv_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps, build, of_heads=True) for _ in "qk")
        sizes = config.heads * config.head_dim, config.hidden_size
        self.output = build.row(f"{name}.output", *sizes, residual_std, bias=config.output_bias)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """[T, B, hidden] -> [T, B, hidden]"""
        qkv = self.qkv(x).transpose(0, 1)  # [B, T, ..]; all of T, also where x is split along the sequence
        qkv = qkv.reshape(*qkv.shape[:2], -1, self.group + 2, self.head_dim)
        q, k, v = qkv.split([self.group, 1, 1], 3)
        q, k = q.flatten(2, 3), k.squeeze(3)  # [B, T, H, D], [B, T, Hkv, D]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = rotary.apply(q), rotary.apply(k)
        out = attend(self.index, q, k, v.squeeze(3))
        return self.output(out.flatten(2).transpose(0, 1).contiguous())


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention within each document, through PyTorch's SDPA (flash where it can): the baseline.

    Args and result as :func:`unfold.kernels.compressed.compressed_attention`; padding attends to nothing and gets zeros.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    out = torch.zeros_like(q)
    for sample, start, stop in layout.document_spans:
        part = [x[sample : sample + 1, :, start:stop] for x in (q, k, v)]
        out[sample, :, start:stop] = F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0]
    return out.transpose(1, 2)
