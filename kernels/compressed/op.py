"""``compressed_attention``: checks its arguments and picks the backend."""

from __future__ import annotations

import math

from torch import Tensor

from unfold.kernels.common.backend import default_backend
from unfold.kernels.compressed.cpu import BLOCK, compressed_attention_cpu
from unfold.kernels.compressed.reference import compressed_attention_reference
from unfold.kernels.intervals import Intervals

BACKENDS = ("reference", "cpu", "triton")


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Attention of every query over the keys that ``intervals`` lets it see.

    Args:
        q: [B, T, H, D] in interleaved order.
        k, v: [B, T, Hkv, D], same dtype and device; H a multiple of Hkv (query head h reads KV head h // (H / Hkv)).
        intervals: the visible sets of the same B samples and T tokens.
        scale: factor on the scores; 1 / sqrt(D) when None.
        backend: 'reference' | 'cpu' | 'triton', or None for the one for q's device: 'triton' on a GPU, 'cpu' on the CPU. The
            first such choice is logged; what the chosen backend cannot do is an error, never another backend.

    Returns:
        [B, T, H, D] in q's dtype.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit, naming the argument.
    """
    check_arguments(q, k, v, intervals)
    if backend is None:
        backend = default_backend("compressed attention", q.device.type)
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "cpu" and q.device.type != "cpu":
        raise ValueError(f"backend: 'cpu' needs tensors on the CPU, q is on {q.device}; use 'triton' or None")
    return _implementation(backend)(q, k, v, intervals, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def prepare_compressed(q: Tensor, k: Tensor, intervals: Intervals, *, backward: bool = True, backend: str | None = None) -> None:
    """Make ahead the plans that :func:`compressed_attention` will ask these intervals for; what is there is not made again.

    Args:
        q, k: [.., H, D] and [.., Hkv, D] of any number of tokens: their heads, dtype and device decide which plans these are.
        intervals: on any device. Where q is on a GPU they may be on its host, whose plans are copied as they are asked for.
        backward: whether gradients will be asked for.
        backend: as there.

    Raises:
        ValueError: what the backend does not serve.
    """
    backend = backend or default_backend("compressed attention", q.device.type)
    if backend == "triton":
        from unfold.kernels.compressed.triton import prepare

        prepare(q, k, intervals, backward)
    elif backend == "cpu":
        intervals.plan(BLOCK)


def _implementation(backend: str):
    """The function behind a name. Triton is imported only where it is used: a CPU run does not need it."""
    if backend == "triton":
        from unfold.kernels.compressed.triton import compressed_attention_triton

        return compressed_attention_triton
    return compressed_attention_cpu if backend == "cpu" else compressed_attention_reference


def check_arguments(q: Tensor, k: Tensor, v: Tensor, intervals: Intervals) -> None:
    """Raise ValueError unless q, k, v and the intervals belong together."""
    if q.dim() != 4:
        raise ValueError(f"q: shape {tuple(q.shape)} has {q.dim()} dimensions, expected [B, T, H, D]")
    batch, tokens, heads, dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, tokens, dim):
            raise ValueError(f"{name}: shape {tuple(x.shape)} does not fit q {tuple(q.shape)}; expected [B, T, Hkv, D]")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}; make them equal")
    if k.shape[2] != v.shape[2] or heads % k.shape[2]:
        raise ValueError(f"k, v: {k.shape[2]} and {v.shape[2]} KV heads; both must be one divisor of q's {heads} heads")
    if not q.is_floating_point():
        raise ValueError(f"q: dtype {q.dtype} is not a floating point type")
    if (intervals.batch, intervals.tokens) != (batch, tokens):
        raise ValueError(f"intervals: made for {intervals.batch} samples of {intervals.tokens} tokens, q has {batch} of {tokens}")
    if intervals.rows.device != q.device:
        raise ValueError(f"intervals: on {intervals.rows.device}, q on {q.device}; use intervals.to(q.device)")
