"""Where the host would wait for a GPU, counted on a machine without one."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from unfold.kernels.common import plans

TORCH = Path(torch.__file__).parent
aten = torch.ops.aten
# Operations that hand a number to the host, or whose result has a size that the GPU decides.
READING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.unique_dim,
    aten.bincount, aten.equal, aten.is_nonzero,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
METHODS = ("tolist", "numpy", "cpu", "__array__")  # that read a tensor without an operation
MAKING = ("tensor", "as_tensor")  # where they name a device, they copy numbers of Python to it


class Waits(TorchDispatchMode):
    """Counts what would make the host wait, within: copies by ``to_device`` stand for tensors of a GPU, and so does what is
    computed from them.

    Attributes:
        where: by (what it waits for, file:line of whoever asked, torch's own code left out) how often.
        operations: tensor operations on such tensors, views included.
        made: tensors that were made of none, as ``torch.empty`` does.
        copies: tensors that were copied from the host.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.where: Counter[tuple[str, str]] = Counter()
        self.operations, self.made, self.copies = 0, 0, 0
        self._there: dict[int, StorageWeakRef] = {}
        self._active = False
        # By name, not by a mode: those for functions do not hold in backward.
        for name in METHODS:
            read = lambda args, kwargs: self.holds(args[0])
            monkeypatch.setattr(Tensor, name, self._watched(getattr(Tensor, name), read))
        for name in MAKING:
            read = lambda args, kwargs: kwargs.get("device") is not None
            monkeypatch.setattr(torch, name, self._watched(getattr(torch, name), read))
        original = plans.to_device
        for module in list(sys.modules.values()):
            if getattr(module, "to_device", None) is original:
                monkeypatch.setattr(module, "to_device", self.to_device)

    def __enter__(self):
        self._active = True
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._active = False

    def _watched(self, function, waits):
        @functools.wraps(function)
        def watched(*args, **kwargs):
            if self._active and waits(args, kwargs):
                self.waits(function.__name__)
            return function(*args, **kwargs)

        return watched

    def to_device(self, x: Tensor, device: torch.device | str | None = None) -> Tensor:
        """A copy "on the GPU"."""
        if self.holds(x):
            return x
        self.copies += 1
        return self.mark(x.detach().clone())

    def mark(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._there[storage._cdata] = StorageWeakRef(storage)  # while this is held, no other storage gets its address
        return x

    def holds(self, *values) -> bool:
        """Whether a tensor among these is "on the GPU"."""
        return any(isinstance(x, Tensor) and x.untyped_storage()._cdata in self._there for x in tree_iter(values))

    def waits(self, what: str) -> None:
        """Something waits here."""
        frame = sys._getframe(2)
        while Path(frame.f_code.co_filename).is_relative_to(TORCH) or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.where[what, f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = self.holds(args, kwargs)
        self.made += not any(isinstance(x, Tensor) for x in tree_iter((args, kwargs)))
        if there:
            packet = func.overloadpacket
            self.operations += 1
            by_mask = packet in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
            unknown = packet is aten.repeat_interleave and kwargs.get("output_size") is None
            if packet in READING or by_mask or unknown:
                self.waits(str(func))
        out = func(*args, **kwargs)
        if there:
            for x in tree_iter(out):
                if isinstance(x, Tensor):
                    self.mark(x)
        return out
