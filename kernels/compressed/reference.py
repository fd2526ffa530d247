"""Compressed attention by the dense mask: slow, T x T memory, obviously right. Every other backend is held against it."""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.kernels.intervals import Intervals


def compressed_attention_reference(q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float) -> Tensor:
    """Softmax attention with ``intervals.dense_mask()``; differentiable by autograd.

    Args:
        q: [B, T, H, D]; k, v: [B, T, Hkv, D], in any floating dtype; scores and softmax are at least fp32.
        intervals: what each query sees.
        scale: factor on the scores.

    Returns:
        [B, T, H, D] in q's dtype; zero where a query sees nothing.
    """
    group = q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = q.to(wide), k.to(wide).repeat_interleave(group, 2), v.to(wide).repeat_interleave(group, 2)
    mask = intervals.dense_mask()[:, None]  # [B, 1, T, T]
    scores = torch.einsum("bqhd,bkhd->bhqk", q_, k_) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v_).to(q.dtype)
