"""What is derived from a micro-batch once and shared by its layers; where reading sizes would make the host wait for a GPU.

A record on a GPU keeps the one on the host that it was copied from. Plans whose sizes have to be read are made of that one and
copied, so that nothing waits: not for the sizes, since the host has them, nor for the copy, which comes from pinned memory.
What is on the host already, because whoever loads micro-batches made it ahead (:mod:`unfold.model.ahead`), is copied too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class Planned:
    """What has plans. Attributes that a class brings: ``plans``, a dict; ``host``, the same on the host, or None; ``device``."""

    plans: dict[Hashable, Any]
    host: Planned | None
    device: torch.device

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when this key was first asked for, here or on the host: plans are made once per micro-batch."""
        if key not in self.plans:
            ready = self.host is not None and key in self.host.plans
            self.plans[key] = moved(self.host.plans[key], self.device) if ready else make()
        return self.plans[key]

    def planned(self, key: Hashable, make: Callable[[Any], Any]) -> Any:
        """The same for what reads sizes: ``make`` of this object, or of the one on the host where there is one."""
        from_host = lambda: moved(self.host.planned(key, make), self.device)
        return self.memo(key, from_host if self.host is not None else lambda: make(self))


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. On its way to a GPU it is pinned first: a copy from pageable memory waits for the GPU's queue."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Numbers:
    """Whole numbers on their way from a GPU to the host: only who reads them waits, and not for what was launched since.

    x: int64, any shape.
    """

    def __init__(self, x: Tensor):
        self._host, self._arrived = x, None
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list:
        """Waits for what stood in the GPU's queue before them, and for nothing after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


def moved(value: Any, device: torch.device | str) -> Any:
    """A plan on a device: records, tuples, lists and dicts with all that is in them."""
    if isinstance(value, Tensor):
        return to_device(value, device)
    if hasattr(value, "to"):
        return value.to(device)
    return _with_parts(value, lambda part: moved(part, device))


def pinned(value: Any) -> Any:
    """The same in pinned host memory, plans included; a tensor that stands in several places is copied once."""
    copies: dict[int, Tensor] = {}

    def pin(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return _with_parts(part, pin)
        if id(part) not in copies:
            copies[id(part)] = part.pin_memory()
        return copies[id(part)]

    return pin(value)


def _with_parts(value: Any, function: Callable[[Any], Any]) -> Any:
    """A record, tuple, list or dict with ``function`` of everything in it; other values as they are."""
    if dataclasses.is_dataclass(value):
        parts = {f.name: function(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **parts)
    if isinstance(value, (tuple, list)):
        return type(value)(function(part) for part in value)
    if isinstance(value, dict):
        return {key: function(part) for key, part in value.items()}
    return value
