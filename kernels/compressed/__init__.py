"""Attention under the compressed mask: what every token sees while *forgetting* (METHOD.md, section 3)."""

from unfold.kernels.compressed.op import compressed_attention

__all__ = ["compressed_attention"]
