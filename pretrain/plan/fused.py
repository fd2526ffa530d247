"""The small operations of a layer as their compiled kernels move memory: nothing is computed, everything is counted.

What each kernel reads and writes is what PyTorch's compiler was counted to make (tests/model/test_pointwise.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.model.pointwise import Pointwise

# A kernel is an operation that is told what it reads and writes, so that whoever watches operations sees it.
NORM = ("add", "rms_norm", "rms_norm_backward", "rms_norm_weight_gradient")
for _name in (*NORM, "rotate", "rotate_backward", "swiglu", "swiglu_backward"):
    torch.library.define(f"fused::{_name}", "(Tensor[] read, Tensor(a!)[] written) -> ()")
    torch.library.impl(f"fused::{_name}", "CompositeExplicitAutograd", lambda read, written: None)
kernel = torch.ops.fused


class _Norm(torch.autograd.Function):
    """A norm and the statistics of its rows that backward reads; backward passes over its input once for each gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty_like(x)
        rows = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
        kernel.rms_norm([x, weight], [out, rows])
        ctx.save_for_backward(x, weight, rows)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _norm_backward(grad, *ctx.saved_tensors)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor]:
    """beside: the gradient that the sum has from elsewhere."""
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
    kernel.rms_norm_weight_gradient([grad, x, rows], [d_weight])
    kernel.rms_norm_backward([grad, x, weight, rows, *beside], [d_x])
    return d_x, d_weight


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.empty_like(x)
        kernel.add([x, y], [total])
        out = torch.empty_like(total)
        rows = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
        kernel.rms_norm([total, weight], [out, rows])
        ctx.save_for_backward(total, weight, rows)
        return total, out

    @staticmethod
    def backward(ctx, d_total: Tensor, grad: Tensor):
        d_x, d_weight = _norm_backward(grad, *ctx.saved_tensors, d_total)
        return d_x, d_x, d_weight


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernel.rotate([x, cos, sin], [out])
        ctx.save_for_backward(cos, sin)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        d_x = torch.empty_like(grad)
        kernel.rotate_backward([grad, *ctx.saved_tensors], [d_x])
        return d_x, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        kernel.swiglu([gate_up], [out])
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gate_up,) = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up)
        kernel.swiglu_backward([grad, gate_up], [d_gate_up])
        return d_gate_up


# In the place of Pointwise.compiled().
COUNTED = Pointwise(
    lambda x, weight, eps: _Norm.apply(x, weight),
    lambda x, y, weight, eps: _AddAndNorm.apply(x, y, weight),
    _Rotate.apply,
    _SwiGLU.apply,
)
