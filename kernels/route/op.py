"""``routing_loss``: checks its arguments and picks the backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unfold.kernels.common.backend import check_backend, default_backend
from unfold.kernels.route.cpu import routing_loss_cpu, rows_of
from unfold.kernels.route.gradient import gists_of
from unfold.kernels.route.queries import Routed
from unfold.kernels.route.reference import routing_loss_reference
from unfold.kernels.select.op import check_queries


def _route_triton(*arguments) -> Tensor:
    """Triton is imported only where it is used: a CPU run does not need it."""
    from unfold.kernels.route.triton import routing_loss_triton

    return routing_loss_triton(*arguments)


BACKENDS = {"reference": routing_loss_reference, "cpu": routing_loss_cpu, "triton": _route_triton}


def routing_loss(
    q: Tensor, k: Tensor, routed: Routed, *, far: bool = False, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """How badly the gists' scores predict where the sampled queries attend to raw tokens; docs/method.md has the formula.

    Teacher, detached: the softmax of a query over its document's raw tokens up to itself, summed per chunk and per group
    upwards, ``m_l``. Student: per level the softmax over all gists before the query. The loss is ``- sum m_l log softmax_l``.

    Args:
        q: [M, H, D], the sampled queries in the order of ``routed.tree.tokens``, rotary applied. Never gets a gradient.
        k: [B, T, Hkv, D], keys in interleaved order, same dtype and device; H a multiple of Hkv. Gists alone get a gradient.
        routed: the sampled queries.
        far: leave the chunks that lie in a query's raw window out of the teacher's sums.
        scale: factor on all scores; 1 / sqrt(D) when None.
        backend: 'reference' | 'cpu' | 'triton', or None: 'cpu' on the CPU, 'triton' on a GPU. 'cpu' runs on any device.

    Returns:
        A scalar, the sum over queries and heads: fp32, or fp64 where q is.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit, naming the argument.
    """
    check_routed(q, k, routed)
    if backend is None:  # without a query there is nothing to launch
        backend = default_backend("route", q.device.type) if routed.tree.queries else "cpu"
    check_backend(backend, BACKENDS)
    return BACKENDS[backend](q, k, routed, far, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def prepare_routing(q: Tensor, k: Tensor, routed: Routed, *, backend: str | None = None) -> None:
    """Make ahead the plans that :func:`routing_loss` will ask for; arguments as of
    :func:`unfold.kernels.compressed.prepare_compressed`."""
    if backend is None:
        backend = default_backend("route", q.device.type) if routed.tree.queries else "cpu"
    gists_of(routed)
    if backend == "triton":
        from unfold.kernels.route.triton import prepare

        prepare(q, k, routed)
    elif backend == "cpu":
        rows_of(routed, q.shape[-2] // k.shape[-2], device=q.device)


def check_routed(q: Tensor, k: Tensor, routed: Routed) -> None:
    """Raise ValueError unless q [M, H, D], k [B, T, Hkv, D] and the sampled queries belong together."""
    check_queries(q, k, routed.tree)
    if routed.first.shape != routed.tree.tokens.shape or routed.first.dtype != torch.int32:
        raise ValueError(
            f"routed: first is {routed.first.dtype} {tuple(routed.first.shape)}, expected torch.int32 ({routed.tree.queries},), "
            "the first raw row of each query's document"
        )
    if routed.first.device != q.device:
        raise ValueError(f"routed: first on {routed.first.device}, q on {q.device}; use routed.to(q.device)")
