"""Self-attention of one layer. Who sees whom is not decided here: an Attend (:mod:`unfold.model.visibility`) is handed in, for
a micro-batch in training, for tokens that are spread over ranks, or for new tokens before a cache."""

from __future__ import annotations

from torch import Tensor, nn

from unfold.model.config import ModelConfig
from unfold.model.layers import BuildContext, RMSNorm, Rotary
from unfold.model.visibility import Attend


class Attention(nn.Module):
    """Grouped-query attention; heads are split over the tensor-parallel group by KV group."""

    def __init__(self, config: ModelConfig, build: BuildContext, index: int, residual_std: float):
        super().__init__()
        name = f"layers.{index}.attention"
        self.index = index
        self.head_dim = config.head_dim
        self.group = config.heads // config.kv_heads
        self.rotates, self.rotate = index not in config.nope_layers, build.pointwise.rotate
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
        return self.project(attend(self.index, *self.heads(x, rotary)))

    def heads(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[T, B, hidden] -> q [B, T, H, D], k, v [B, T, Hkv, D]"""
        qkv = self.qkv(x).transpose(0, 1)  # [B, T, ..]; all of T, also where x is split along the sequence
        qkv = qkv.reshape(*qkv.shape[:2], -1, self.group + 2, self.head_dim)
        q, k, v = qkv.split([self.group, 1, 1], 3)
        q, k = q.flatten(2, 3), k.squeeze(3)  # [B, T, H, D], [B, T, Hkv, D]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = (self.rotate(x, rotary.cos, rotary.sin) for x in (q, k))
        return q, k, v.squeeze(3)

    def project(self, out: Tensor) -> Tensor:
        """What the heads found, [B, T, H, D] -> [T, B, hidden]"""
        return self.output(out.flatten(2).transpose(0, 1).contiguous())
