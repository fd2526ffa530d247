"""Attention of single new tokens over the caches of their sequences (METHOD.md, section 7)."""

from kernels.decode.op import decode_attention
from kernels.decode.step import Step

__all__ = ["Step", "decode_attention"]
