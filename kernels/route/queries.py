"""Which queries route: the sampled recalling queries of a micro-batch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unfold.kernels.common.plans import Planned, to_device
from unfold.kernels.tree import GistTree


@dataclass(frozen=True)
class Routed(Planned):
    """The ``M`` sampled queries of a micro-batch and where their documents' raw tokens begin.

    Attributes:
        tree: whose queries are the sampled ones, in the same row space as the micro-batch.
        first: [M] int32, the first raw row of each query's document.
        plans: what :meth:`memo` keeps, shared by all layers of a micro-batch. Not those of ``tree.others``: a tree with
            other queries may share them.
        host: the same on the host, where this was copied from it.
    """

    tree: GistTree
    first: Tensor
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    host: Routed | None = field(default=None, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.first.device

    def to(self, device: torch.device | str) -> Routed:
        """The same on a device: this one, if it is there."""
        first = to_device(self.first, device)
        if first is self.first:
            return self
        return Routed(self.tree.to(device), first, host=self if self.device.type == "cpu" else None)
