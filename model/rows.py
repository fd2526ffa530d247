"""The rows of some ids as a parameter of their own, ``embedding.rows`` and ``head.rows``, so that they alone are trained, or
faster than the others.

In the vocabulary's matrix their rows lie unused; what the model computes, and what a checkpoint holds, is the matrix with
these in their places. Every tensor-parallel rank has all of them: there are a few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unfold.model.parallel.tensor import Group, copy_to_group

ROWS = "rows"


def add_rows(
    module: nn.Module, ids: Sequence[int], shape: tuple[int, int], init: Callable[[Tensor], Tensor], group: Group
) -> None:
    """Give the owner of a vocabulary's matrix [vocab, hidden] these rows, with the values that they have in it at first.

    shape, init: of the whole matrix; group: over whose ranks it is split.
    """
    ids = tuple(sorted(ids))
    own = shape[0] // group.size()
    mine = [(i, row % own) for i, row in enumerate(ids) if row // own == group.rank()]
    module.register_parameter(ROWS, nn.Parameter(init(torch.empty(shape))[list(ids)].clone()))
    module.rows.row_ids = module.weight.row_ids = ids  # told to checkpoints
    module.register_buffer("row_ids", torch.tensor(ids), persistent=False)
    # Which of the rows this rank's part of the matrix takes, and where: made here, since a copy to a GPU would be waited for.
    module.register_buffer("rows_taken", torch.tensor([i for i, _ in mine], dtype=torch.int64), persistent=False)
    module.register_buffer("rows_places", torch.tensor([place for _, place in mine], dtype=torch.int64), persistent=False)


def with_own_rows(x: Tensor, ids: Tensor, rows: Tensor, row_ids: Tensor) -> Tensor:
    """Embedded tokens [T, B, hidden] of ids [B, T], those of ``row_ids`` replaced by ``rows``."""
    match = ids.t()[..., None] == row_ids  # [T, B, n]
    # As a product: its backward sums the gradients of each row in one go.
    return torch.where(match.any(-1, keepdim=True), match.to(rows.dtype) @ rows, x)


def matrix_with_rows(module: nn.Module, group: Group) -> Tensor:
    """This rank's part of the matrix, [vocab / n, hidden], with the rows in their places."""
    weight, rows = module.weight, getattr(module, ROWS, None)
    if rows is None:
        return weight
    # All ranks take part in the sum of the gradients, also those that have none of these ids.
    return weight.index_copy(0, module.rows_places, copy_to_group(rows, group).index_select(0, module.rows_taken))
