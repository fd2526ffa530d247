"""Attention of single new tokens over the caches of their sequences (docs/method.md#generation)."""

from unfold.kernels.decode.op import decode_attention
from unfold.kernels.decode.step import Step

__all__ = ["Step", "decode_attention"]
