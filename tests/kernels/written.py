"""What of torch's memory has been written: the half of the sanitizer (tests/kernels/sanitizer.py) that watches torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LONGEST = 8  # bytes of an element

# Operations that allocate and do not write.
EMPTY = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
# Operations that read some elements of their first argument.
INDEXED = {"index", "index_select", "gather"}
# Operations that read shapes alone, or make views without saying so in their schemas.
SHAPES = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full", "_unsafe_view"}


class SanitizerError(AssertionError):
    """Names the fault, the kernel, the programs, the argument, the element and the lines."""


class Memory(TorchDispatchMode):
    """Which bytes of the memory that torch allocated without a value have been written since.

    Its storages are kept, so that no address is used twice. What was allocated begins as NaN or a huge number.
    """

    def __init__(self):
        super().__init__()
        self.known: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # by address; bool per byte

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name, schema, options = operation.overloadpacket.__name__, operation._schema, options or {}
        if name in EMPTY:
            return self._allocated(operation(*arguments, **options))
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns)
        written = []
        for i, parameter in enumerate(schema.arguments):
            value = arguments[i] if i < len(arguments) else options.get(parameter.name)
            tensors = [x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Tensor)]
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                written += tensors
            elif i == 0 and name in INDEXED:
                if (part := self._bytes(value)) is not None:
                    self._check(operation(part.all(-1), *arguments[1:], **options), name, value)
            elif not is_view and name not in SHAPES:
                for x in tensors:
                    if (part := self._bytes(x)) is not None:
                        self._check(part.all(-1), name, x)
        result = operation(*arguments, **options)
        for x in written:  # all of it, even if by index
            if (part := self._bytes(x)) is not None:
                part.fill_(True)
        return result

    def written(self, storage: torch.UntypedStorage) -> Tensor | None:
        """Whether each byte of a storage was written; None where all were."""
        return self.known.get(storage.data_ptr(), (None, None))[1]

    def _allocated(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.nbytes():
            if x.dtype != torch.bool:
                x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max // 2)
            self.known[storage.data_ptr()] = storage, torch.zeros(padded(storage), dtype=torch.bool)
        return x

    def _bytes(self, x: Tensor) -> Tensor | None:
        """The part of :meth:`written` that a tensor covers, a view [*shape, bytes of an element]."""
        written = self.written(x.untyped_storage()) if x.layout == torch.strided else None
        if written is None:
            return None
        size = x.element_size()
        return written.as_strided((*x.shape, size), (*(size * s for s in x.stride()), 1), size * x.storage_offset())

    def _check(self, written: Tensor, operation: str, x: Tensor) -> None:
        if not written.all():
            first = tuple((~written).nonzero()[0].tolist())
            which = f"element {first}" + (" of the result" if operation in INDEXED else "")
            raise SanitizerError(f"unwritten memory: torch's {operation} reads {kind_of(x)}, {which}")


def padded(storage: torch.UntypedStorage) -> int:
    """Its bytes, whole numbers of the longest elements."""
    return -(-storage.nbytes() // LONGEST) * LONGEST


def kind_of(x: Tensor) -> str:
    """Dtype and shape, in words."""
    return f"{x.dtype} {list(x.shape)}".removeprefix("torch.")
