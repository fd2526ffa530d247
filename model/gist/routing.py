"""The routing loss of a micro-batch, and its way into backward (docs/method.md#training-the-routing)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unfold.kernels.route import Routed


@dataclass(frozen=True)
class Routing:
    """Whose routing loss is taken, and how (docs/method.md#training-the-routing).

    Attributes:
        routed: the sampled queries.
        far: chunks in a query's window are left out of its teacher.
        scale: what a unit of one layer's loss, a sum over queries and heads, weighs in what backward starts from.
        losses: each layer's sum, by its index; filled by the forward pass.
    """

    routed: Routed
    far: bool
    scale: float
    losses: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device | str) -> Routing:
        """The same on another device."""
        return replace(self, routed=self.routed.to(device))

    def take(self, index: int, loss: Tensor, out: Tensor) -> Tensor:
        """Keep a layer's loss; returns its attention's output, whose backward brings the loss its gradient."""
        self.losses[index] = loss.detach()
        return _WithLoss.apply(out, loss, self.scale)


class _WithLoss(torch.autograd.Function):
    """A layer's own loss on the way through it: so it reaches backward in a pipeline too, whose last stage has the loss.

    As megatron-core's MoEAuxLossAutoScaler does it, but without a scale that is shared by everything.
    """

    @staticmethod
    def forward(ctx, out: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, torch.full_like(ctx.like, ctx.scale), None
