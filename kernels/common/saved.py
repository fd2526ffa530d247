"""Dataclasses of tensors in autograd functions: what ``ctx`` holds by itself, checkpoints and saved-tensor hooks never see."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

from torch import Tensor

Record = TypeVar("Record")


def without_tensors(record: Record) -> tuple[Record, list[Tensor]]:
    """A dataclass with its tensors, and those in its tuples, taken out, and these, for ``save_for_backward``."""
    tensors: list[Tensor] = []
    blank = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            tensors.append(value)
            blank[field.name] = None
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            tensors += value
            blank[field.name] = (None,) * len(value)
    return replace(record, **blank), tensors


def with_tensors(record: Record, tensors: list[Tensor]) -> Record:
    """The inverse."""
    left, filled = iter(tensors), {}
    for field in fields(record):
        value = getattr(record, field.name)
        if value is None:
            filled[field.name] = next(left)
        elif isinstance(value, tuple) and value and value[0] is None:
            filled[field.name] = tuple(next(left) for _ in value)
    return replace(record, **filled)
