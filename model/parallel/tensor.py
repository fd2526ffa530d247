"""Linear layers and embedding over the tensor-parallel group, with or without sequence parallelism, on CPU and CUDA.

megatron-core's layers hold the weights; their own sequence parallelism works on CUDA only, so what crosses ranks is done
here. Under sequence parallelism the residual stream is split over the group along the sequence (dimension 0): a column
layer gathers it, a row layer scatters the sum, and backward does the transpose of each.

The group is the one that is handed in, never megatron-core's global one, and nothing is sent in a group of one: so a process that
shares no layer needs no torch.distributed (:class:`Alone`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from unfold.model.parallel.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
    reduce_from_tensor_model_parallel_region,
)


class Alone:
    """The group of a process that shares nothing: what is asked of a ProcessGroup here, without torch.distributed."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


Group = ProcessGroup | Alone


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def _own_part(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.chunk(group.size())[group.rank()].contiguous()


class _Exchange(torch.autograd.Function):
    """One way of exchanging the parts of a sequence forward, its transpose backward."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup, there: Callable, back: Callable) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad, ctx.group), None, None, None


def gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[T / n, ..] -> [T, ..], all ranks' parts; backward sums the ranks' gradients and keeps this rank's part."""
    return _Exchange.apply(x, group, _all_gather, _reduce_scatter)


def scatter_sum_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[T, ..] -> [T / n, ..], this rank's part of the sum over ranks; backward gathers."""
    return _Exchange.apply(x, group, _reduce_scatter, _all_gather)


def split_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[T, ..], equal on all ranks -> [T / n, ..], this rank's part; backward gathers."""
    return _Exchange.apply(x, group, _own_part, _all_gather)


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """What all ranks have alike and each uses for a part of its own: backward sums their gradients."""
    return x if group.size() == 1 else copy_to_tensor_model_parallel_region(x, group=group)


def sum_over_group(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' tensors; backward hands the gradient on."""
    return x if group.size() == 1 else reduce_from_tensor_model_parallel_region(x, group=group)


def gather_outputs(x: Tensor, group: Group) -> Tensor:
    """[.., outputs / n] -> [.., outputs], all ranks' parts."""
    return x if group.size() == 1 else gather_from_tensor_model_parallel_region(x, group=group)


class _Adapted:
    """What a linear layer's output is made with.

    Attributes:
        adapter: what computes its low-rank adapters (:mod:`unfold.model.lora`); None where it has none.
    """

    adapter = None

    def own(self) -> tuple[Tensor, ...]:
        """Its weight, its bias where it has one, its adapters' weights where it has some: what :meth:`product` takes."""
        adapters = () if self.adapter is None else (self.lora_a, self.lora_b)
        return (self.weight, *(() if self.bias is None else (self.bias,)), *adapters)

    def _told_apart(self, own: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """(weight, bias, adapters' weights)"""
        weight, *more = own
        return weight, None if self.bias is None else more.pop(0), tuple(more)


class ColumnLinear(_Adapted, ColumnParallelLinear):
    """A linear layer with its outputs, and its bias where it has one, split over the group."""

    def __init__(self, *args, tp_group: Group, sequence_split: bool, **kwargs):
        super().__init__(*args, tp_group=tp_group, **kwargs)
        self.tp_group = tp_group  # megatron-core drops it where torch.distributed is not in use
        self.sequence_split = sequence_split

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, inputs] (T / n under sequence parallelism) -> [T, B, outputs / n]"""
        return self.product(x, *self.own())

    def product(self, x: Tensor, *own: Tensor) -> Tensor:
        """The same with other weights in place of :meth:`own`."""
        weight, bias, adapters = self._told_apart(own)
        whole = gather_sequence(x, self.tp_group) if self.sequence_split else x
        out = column_product(whole, weight, self.tp_group, self.sequence_split, bias)
        return out + self.adapter.beside_column(x, *adapters, self.tp_group, self.sequence_split) if adapters else out


def column_product(x: Tensor, weight: Tensor, group: Group, input_is_gathered: bool, bias: Tensor | None = None) -> Tensor:
    """x [.., inputs], equal on all ranks, times this rank's rows of a weight, plus its bias -> [.., outputs / n].

    input_is_gathered: x comes from :func:`gather_sequence`, whose backward sums the gradient over ranks; else it is done here.
    """
    return _product(x, weight, bias, group, sum_gradient=group.size() > 1 and not input_is_gathered)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sum_gradient: bool) -> Tensor:
    """x [.., inputs] times a weight's rows, plus a bias. sum_gradient: that of x is summed over the group."""
    if weight.requires_grad or not torch.is_grad_enabled():
        return linear_with_grad_accumulation_and_async_allreduce(x, weight, bias, False, sum_gradient, False, tp_group=group)
    # A weight that is not trained: its gradient is not computed, and x is not kept for it.
    out = linear_with_frozen_weight(x, weight, None, False, sum_gradient, False, tp_group=group)
    return out if bias is None else out + bias


class RowLinear(_Adapted, RowParallelLinear):
    """A linear layer with its inputs split over the group; outputs are summed, the bias is whole on every rank."""

    def __init__(self, *args, tp_group: Group, sequence_split: bool, **kwargs):
        super().__init__(*args, input_is_parallel=True, skip_bias_add=False, tp_group=tp_group, **kwargs)
        self.tp_group = tp_group
        self.sequence_split = sequence_split

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, inputs / n] -> [T, B, outputs] (T / n under sequence parallelism)"""
        return self.product(x, *self.own())

    def product(self, x: Tensor, *own: Tensor) -> Tensor:
        """The same with other weights in place of :meth:`own`."""
        weight, bias, adapters = self._told_apart(own)
        partial = _product(x, weight, None, self.tp_group, sum_gradient=False)
        if self.sequence_split:
            out = scatter_sum_sequence(partial, self.tp_group)
            if bias is not None:  # added to each rank's part of the sequence: their gradients are summed
                bias = copy_to_group(bias, self.tp_group)
        else:
            out = sum_over_group(partial, self.tp_group)
        if adapters:
            out = out + self.adapter.beside_row(x, *adapters, self.tp_group, self.sequence_split)
        return out if bias is None else out + bias


class VocabularyEmbedding(VocabParallelEmbedding):
    """Token embedding with the vocabulary split over the group."""

    def __init__(self, *args, tp_group: Group, sequence_split: bool, **kwargs):
        super().__init__(*args, tp_group=tp_group, **kwargs)
        self.tp_group = tp_group
        self.sequence_split = sequence_split

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] int64 -> [T, B, hidden] (T / n under sequence parallelism)"""
        x = F.embedding(ids, self.weight) if self.tp_group.size() == 1 else super().forward(ids)
        x = self.replaced(x.transpose(0, 1).contiguous(), ids)
        return split_sequence(x, self.tp_group) if self.sequence_split else x

    def replaced(self, x: Tensor, ids: Tensor) -> Tensor:
        """Embedded tokens [T, B, hidden] with what stands in place of rows of the matrix."""
        return x


def reduce_in_place(x: Tensor, operation: dist.ReduceOp.RedOpType, group: Group) -> None:
    """Of all ranks' tensors their sum, maximum, .., without a gradient."""
    if group.size() > 1:
        dist.all_reduce(x, op=operation, group=group)
