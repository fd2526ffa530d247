"""A tensor that grows at its end."""

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
    """

    def __init__(self, shape: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device | str):
        self.dim, self.length = dim, 0
        self.memory = torch.empty([*shape[:dim], 0, *shape[dim + 1 :]], dtype=dtype, device=device)

    def append(self, rows: Tensor) -> None:
        """Append rows: of the same shape but for the growing dimension."""
        length = self.length + rows.shape[self.dim]
        if length > self.memory.shape[self.dim]:
            shape = list(self.memory.shape)
            shape[self.dim] = max(length, 2 * shape[self.dim], 16)
            memory = self.memory.new_empty(shape)
            memory.narrow(self.dim, 0, self.length).copy_(self.rows)
            self.memory = memory
        self.memory.narrow(self.dim, self.length, rows.shape[self.dim]).copy_(rows)
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        assert length <= self.length
        self.length = length

    @property
    def rows(self) -> Tensor:
        """All rows, a view."""
        return self.memory.narrow(self.dim, 0, self.length)
