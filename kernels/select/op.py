"""``select_gists``: checks its arguments and picks the backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unfold.kernels.common.backend import check_backend, default_backend
from unfold.kernels.select.cpu import BLOCK, select_gists_cpu
from unfold.kernels.select.reference import select_gists_reference
from unfold.kernels.select.selection import Selection, SelectRule
from unfold.kernels.tree import GistTree


def _select_triton(*arguments) -> Selection:
    """Triton is imported only where it is used: a CPU run does not need it."""
    from unfold.kernels.select.triton import select_gists_triton

    return select_gists_triton(*arguments)


BACKENDS = {"reference": select_gists_reference, "cpu": select_gists_cpu, "triton": _select_triton}


@torch.no_grad()
def select_gists(
    q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, *, scale: float | None = None, backend: str | None = None
) -> Selection:
    """The gists that every recalling query selects, level by level from the top. Exact, deterministic, no gradient.

    Args:
        q: [N, H, D], the recalling queries in the order of ``tree.tokens``, rotary applied.
        k: [B, T, Hkv, D], keys in interleaved order, same dtype and device; H a multiple of Hkv.
        tree: the hierarchy of the same B samples and T tokens, and its N queries.
        rule: budget and sharing.
        scale: factor on the scores, of importance to top-p only; 1 / sqrt(D) when None.
        backend: 'reference' | 'cpu' | 'triton', or None: 'cpu' on the CPU, 'triton' on a GPU. 'cpu' runs on any device.

    Returns:
        The selection, per query and KV head.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit, naming the argument.
    """
    check_queries(q, k, tree)
    if backend is None:
        backend = default_backend("select", q.device.type) if tree.queries else "cpu"
    check_backend(backend, BACKENDS)
    run = BACKENDS[backend if tree.queries else "cpu"]  # without a query there is nothing to launch
    return run(q, k, tree, rule, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def prepare_select(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, *, backend: str | None = None) -> None:
    """Make ahead the plans that :func:`select_gists` will ask this tree for; arguments as of :func:`prepare_compressed`."""
    if tree.queries == 0:
        return
    backend = backend or default_backend("select", q.device.type)
    if backend == "triton":
        from unfold.kernels.select.triton import prepare

        prepare(q, k, tree, rule)
    elif backend == "cpu":
        tree.plan(BLOCK)


def check_queries(q: Tensor, k: Tensor, tree: GistTree) -> None:
    """Raise ValueError unless the queries q [N, H, D], the keys k [B, T, Hkv, D] and the tree belong together."""
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q: {q.dtype} {tuple(q.shape)}, expected the recalling queries, floating point [N, H, D]")
    if q.shape[0] != tree.queries:
        raise ValueError(f"q: {q.shape[0]} queries, the tree has {tree.queries}; take them by tree.tokens")
    others = tree.others
    if k.dim() != 4 or k.shape[:2] != (others.batch, others.tokens) or k.shape[3] != q.shape[2]:
        raise ValueError(
            f"k: shape {tuple(k.shape)}, expected [{others.batch}, {others.tokens}, Hkv, {q.shape[2]}] to fit the tree and q"
        )
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k: {k.dtype} on {k.device}, but q is {q.dtype} on {q.device}; make them equal")
    if q.shape[1] % k.shape[2]:
        raise ValueError(f"k: {k.shape[2]} KV heads do not divide q's {q.shape[1]} heads")
    if tree.tokens.device != q.device:
        raise ValueError(f"tree: on {tree.tokens.device}, q on {q.device}; use tree.to(q.device)")
