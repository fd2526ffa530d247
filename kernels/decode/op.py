"""``decode_attention``: checks its arguments and picks the backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from unfold.kernels.common.backend import check_backend, default_backend
from unfold.kernels.decode.cpu import decode_attention_cpu
from unfold.kernels.decode.reference import decode_attention_reference
from unfold.kernels.decode.step import RowStore, Step
from unfold.kernels.select.selection import SelectRule


def _decode_triton(*arguments) -> Tensor:
    """Triton is imported only where it is used: a CPU run does not need it."""
    from unfold.kernels.decode.triton import decode_attention_triton

    return decode_attention_triton(*arguments)


BACKENDS = {"reference": decode_attention_reference, "cpu": decode_attention_cpu, "triton": _decode_triton}


def decode_attention(
    q: Tensor,
    layers: Sequence[Sequence[RowStore]],
    step: Step,
    rule: SelectRule | None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of new tokens, each over the cache of its own sequence, which is read in place.

    Args:
        q: [N, H, D], rotary applied; the tokens' own keys and values are in the cache already.
        layers: for each query, its sequence's rows of every segment: gists from the top level down, then raw tokens.
        step: what the queries may read, and which of them recall.
        rule: budget and sharing of the selection; None where nothing recalls.
        scale: factor on the scores; 1 / sqrt(D) when None.
        backend: 'reference' | 'cpu' | 'triton', or None: 'cpu' on the CPU, 'triton' on a GPU. 'cpu' runs on any device.

    Returns:
        [N, H, D] in q's dtype.

    Raises:
        ValueError: a shape, dtype or backend that does not fit, naming the argument.
    """
    if q.dim() != 3 or len(q) != step.queries or len(layers) != step.queries:
        raise ValueError(f"q: shape {tuple(q.shape)} and {len(layers)} caches, expected [N, H, D] and N; N is {step.queries}")
    memory = layers[0][-1].memory
    if memory.shape[3] != q.shape[2] or q.shape[1] % memory.shape[1] or memory.dtype != q.dtype:
        raise ValueError(f"q: {q.dtype} {tuple(q.shape)} does not fit a cache of {memory.dtype} {tuple(memory.shape)}")
    if rule is None and bool(step.recalls.any()):
        raise ValueError("rule: None, but some tokens recall; say how gists are selected")
    if backend is None:
        backend = default_backend("decode", q.device.type)
    check_backend(backend, BACKENDS)
    return BACKENDS[backend](q, layers, step, rule, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
