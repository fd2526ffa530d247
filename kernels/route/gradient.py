"""A loss that comes with its gradient: it is a sum, and only gists get one, so whoever computes it knows both."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unfold.kernels.route.queries import Routed


def gists_of(routed: Routed) -> int:
    """The (memoised) gists of the sample that has most."""
    return routed.planned("gists", lambda whole: int(whole.tree.others.segment_start[:, whole.tree.levels].max()))


def wants_gradient(k: Tensor) -> bool:
    """Whether the gradient will be asked for."""
    return k.requires_grad and torch.is_grad_enabled()


def with_gradient(k: Tensor, loss: Tensor, d_gists: Tensor, tokens: Tensor) -> Tensor:
    """The loss, whose backward gives ``k`` the gradient that is known already.

    Args:
        k: [B, T, Hkv, D].
        loss: scalar.
        d_gists: [B, n, Hkv, D], at least fp32, for a loss whose own gradient is 1.
        tokens: [B, n] int64, all different within a sample: which keys these are of. All others get zeros.
    """
    return _WithGradient.apply(k, loss, d_gists, tokens)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k: Tensor, loss: Tensor, d_gists: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(d_gists, tokens)
        ctx.like = k.shape, k.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        d_gists, tokens = ctx.saved_tensors
        shape, dtype = ctx.like
        d_k = torch.zeros(shape, dtype=dtype, device=d_gists.device)
        d_k[torch.arange(shape[0], device=d_k.device)[:, None], tokens] = (d_gists * d_loss).to(dtype)
        return d_k, None, None, None
