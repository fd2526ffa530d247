"""A look at the queries and keys of every attention layer while a batch passes through a model: no pass of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from unfold.model.attention import Attention
from unfold.model.parallel.context import ContextAttention
from unfold.model.visibility import Attend, MicroBatchAttention

# (attention of a micro-batch whose tokens are all here, layer index, q [B, T, H, D], k [B, T, Hkv, D])
Look = Callable[[MicroBatchAttention, int, Tensor, Tensor], None]


@contextlib.contextmanager
def looking(model: nn.Module, *looks: Look) -> Iterator[None]:
    """While it lasts, ``looks`` are called by every attention layer of the model, before it attends.

    Only not by layers that recall over context ranks which exchange gists: there no rank has what a query reads.
    """
    hook = lambda module, arguments: (*arguments[:2], _probe(arguments[2], looks))
    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, Attention)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _probe(attend: Attend, looks: Sequence[Look]) -> Attend:
    if isinstance(attend, ContextAttention):  # looked at where whole rows of attention are
        if attend.recall is not None and attend.part.context.exchanges:
            return attend
        return replace(attend, make=lambda layout, recall: _probe(attend.make(layout, recall), looks))

    def probed(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for look in looks:
            look(attend, index, q, k)
        return attend(index, q, k, v)

    return probed
