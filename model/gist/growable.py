"""Rows that are appended: how caches and the borders of a growing text keep theirs. Shipped with exports; needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Growable:
    """Rows appended along one dimension, in memory that doubles when it is full: amortised O(1) per row.

    Args:
        shape: of the tensor without rows; its entry at ``dim`` is ignored.
        dim: the dimension that grows.
        dtype, device: of the tensor.
        reader: a GPU whose kernels read and write the rows where they lie in host memory, which then is pinned.

    Attributes:
        length: rows.
        memory: what they lie in.
        moves: how often that was other memory than before.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        reader: torch.device | None = None,
    ):
        self.dim, self.length, self.reader, self.moves = dim, 0, reader, 0
        self.memory = torch.empty([*shape[:dim], 0, *shape[dim + 1 :]], dtype=dtype, device=device)

    def append(self, rows: Tensor) -> None:
        """Append rows: of the same shape but for the growing dimension."""
        length = self.length + rows.shape[self.dim]
        self.reserve(length)
        self.memory.narrow(self.dim, self.length, rows.shape[self.dim]).copy_(rows)
        self.length = length

    def reserve(self, room: int) -> None:
        """Make room for so many rows in all; those behind ``length`` hold anything."""
        if room > self.memory.shape[self.dim]:
            self._move(max(room, 2 * self.memory.shape[self.dim], 16))

    def forget(self, first: int, count: int) -> None:
        """Take out ``count`` rows from number ``first`` on; those behind them move up."""
        behind = self.length - first - count
        kept = self.memory.narrow(self.dim, first + count, behind).clone()  # lest it is read where it is being written
        self.memory.narrow(self.dim, first, behind).copy_(kept)
        self.length -= count

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        assert length <= self.length
        self.length = length

    def copy(self) -> Growable:
        """Rows that grow independently."""
        other = object.__new__(Growable)
        other.__dict__.update(self.__dict__)
        other._move(self.memory.shape[self.dim])
        return other

    def __deepcopy__(self, memo) -> Growable:
        return self.copy()  # a copied tensor would be pinned no more

    def _move(self, room: int) -> None:
        """To new memory with room for so many rows."""
        shape = [*self.memory.shape[: self.dim], room, *self.memory.shape[self.dim + 1 :]]
        memory = torch.empty(shape, dtype=self.memory.dtype, device=self.memory.device, pin_memory=self.reader is not None)
        if self.reader is not None:  # launched kernels may still use the memory, of which its allocator knows nothing
            torch.cuda.synchronize(self.reader)
        memory.narrow(self.dim, 0, self.length).copy_(self.rows)
        self.memory = memory
        self.moves += 1

    @property
    def rows(self) -> Tensor:
        """All rows, a view."""
        return self.memory.narrow(self.dim, 0, self.length)
