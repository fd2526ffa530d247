"""Which queries route: the sampled recalling queries of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unfold.kernels.tree import GistTree


@dataclass(frozen=True)
class Routed:
    """The ``M`` sampled queries of a micro-batch and where their documents' raw tokens begin.

    Attributes:
        tree: whose queries are the sampled ones, in the same row space as the micro-batch.
        first: [M] int32, the first raw row of each query's document.
        plans: what :meth:`memo` keeps, shared by all layers of a micro-batch. Not those of ``tree.others``: a tree with
            other queries may share them.
    """

    tree: GistTree
    first: Tensor
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str) -> Routed:
        """The same on another device."""
        return Routed(self.tree.to(device), self.first.to(device, non_blocking=True))

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time this key was asked for: plans are made once per micro-batch."""
        if key not in self.plans:
            self.plans[key] = make()
        return self.plans[key]
