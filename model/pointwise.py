"""The small operations of a layer: norm, rotation, the feed-forward layer's activation, each a function of its own.

As they are here, each of their steps is a kernel that reads and writes memory. Compiled, a function is one kernel or two forward
and one or two backward, with the same roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GRAPHS = 64  # of one function in a process, at most


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last dimension, computed in at least fp32: x [.., size], weight [size] -> [.., size]"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_and_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    x = x + y
    return x, rms_norm(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D], cos, sin fp32 [B, T, 1, D / 2] -> [B, T, H, D]: the first half of a head against its second half (Hugging
    Face's convention)."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [.., 2 F] -> [.., F]"""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class Pointwise:
    """The functions of this module, as they are or compiled."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    add_and_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_and_norm
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    swiglu: Callable[[Tensor], Tensor] = swiglu

    @classmethod
    def compiled(cls) -> Pointwise:
        """Compiled by PyTorch when they are first called, once for all lengths."""
        # The halves of a head are joined by the kernel that computes them, on a CPU too. Gradients of gate and up are written
        # into their places: joined later, each would be computed twice or lie in memory first.
        joined = {"force_pointwise_cat": True}
        in_place = {"max_pointwise_cat_inputs": 0, "max_complex_pointwise_cat_inputs": 0}
        # A norm is met with and without gradients, of the stream and of heads, made here and brought back from the host: each a
        # graph of its own. Beyond the limit a function runs as it is, and what it saves would differ between a part's two passes.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        norms = _Compiled(rms_norm, 1), _Compiled(add_and_norm, 1)
        return cls(*norms, _Compiled(rotate, 2, joined), _Compiled(swiglu, 1, in_place))


class _Compiled:
    """A function compiled for any number of samples and tokens; the model's own sizes are known to the compiler."""

    def __init__(self, function: Callable, own: int, options: dict | None = None):
        """own: so many last dimensions of its inputs are sizes of the model; options: of inductor."""
        # Roundings between the steps stay where they are written.
        options = {"emulate_precision_casts": True} | (options or {})
        self.own, self.function = own, torch.compile(function, dynamic=True, options=options)

    def __call__(self, *inputs: Tensor | float) -> Tensor | tuple[Tensor, Tensor]:
        for x in inputs:
            if isinstance(x, Tensor) and x.dim() > self.own:
                torch._dynamo.mark_static(x, list(range(x.dim() - self.own, x.dim())))
        return self.function(*inputs)
