"""Attention under the compressed mask: what every token sees while *forgetting* (docs/method.md#who-sees-whom)."""

from unfold.kernels.compressed.op import compressed_attention, prepare_compressed

__all__ = ["compressed_attention", "prepare_compressed"]
