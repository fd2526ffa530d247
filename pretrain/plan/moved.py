"""What the operations of a piece of code move and multiply: counted one by one as they run, on any device (meta too)."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
# They move nothing: they reserve memory or look at what is there.
FREE = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.detach, aten.lift_fresh, aten.resize_}
PRODUCTS = {aten.mm: 0, aten.addmm: 1, aten.bmm: 0, aten.baddbmm: 1}  # where their first factor stands
CHOOSING = {aten.index_select, aten.gather, aten.index, aten.embedding}
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}


class Moved(TorchDispatchMode):
    """Counts operations that move memory: each one kernel on a GPU, which reads its inputs once and writes its output once.

    Attributes:
        kernels: how many, by name.
        bytes: what they read and write, by name.
        products: FLOPs of matrix products, which are not among the former.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes, self.products = Counter(), Counter(), 0

    @property
    def total(self) -> int:
        """Bytes of all operations."""
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        there = {x.untyped_storage()._cdata for x in given}  # what an output shares with an input is a view
        if packet in PRODUCTS:
            self.products += 2 * made[0].numel() * args[PRODUCTS[packet]].shape[-1]
        elif packet not in FREE and (func._schema.is_mutable or any(x.untyped_storage()._cdata not in there for x in made)):
            self._note(packet, given, made)
        return out

    def _note(self, packet: torch._ops.OpOverloadPacket, given: list[Tensor], made: list[Tensor]) -> None:
        read = given
        if packet in CHOOSING:
            read = [*made, *given[1:]]  # of the first only what is chosen
        elif packet in OVERWRITING:
            read = given[1:]
        name = packet._qualified_op_name
        self.kernels[name] += 1
        self.bytes[name] += sum(_extent(x) for x in (*read, *made))


def _extent(x: Tensor) -> int:
    """Bytes of a tensor that lie in memory: what is expanded is read once."""
    return x.element_size() * torch.Size(n for n, stride in zip(x.shape, x.stride()) if stride or n == 1).numel()
