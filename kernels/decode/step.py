"""What a step of decoding reads: a few tokens, each a query of its own over the cache of its sequence."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class RowStore(Protocol):
    """Keys and values of one segment of a sequence in one layer; model.cache.Rows.

    ``memory`` [2, Hkv, capacity, D] is what they lie in, keys first; the other methods read rows of every KV head, see there.
    """

    memory: Tensor

    def keys(self, lo: int, hi: int) -> Tensor: ...

    def values(self, lo: int, hi: int) -> Tensor: ...

    def keys_at(self, rows: Tensor) -> Tensor: ...

    def values_at(self, rows: Tensor) -> Tensor: ...


class Borders(Protocol):
    """Which items lie behind which gist of a growing document; model.gist.growing.Outline."""

    levels: int
    sink: int

    def children(self, segment: int, gists: Tensor) -> tuple[Tensor, Tensor]:
        """The items ``[lo, hi)`` of the segment below that gists of any shape closed."""

    def ends_on(self, device: torch.device) -> tuple[Sequence[Tensor], Sequence[int]]:
        """Per segment of gists: int64, how many items of the segment below stand before each; the most that one gist closed."""


@dataclass(frozen=True)
class Step:
    """N new tokens; item numbers are those of their sequences' segments (model.gist.growing.Sight), tensors int64 on the CPU.

    Attributes:
        borders: [N], of each token's sequence.
        lo, hi: [L + 1, N], what a token sees under the compressed mask; segment L is its raw window.
        sinks: [N], how many of the first raw tokens it sees beside that window.
        upto: [L + 1, N], items up to and including the token.
        tail: [L, N], the first gist whose parent is not closed yet.
        span: [N], interleaved tokens up to and including the token.
        recalls: bool [N], whether it unfolds chunks.
        plans: what :meth:`memo` keeps; shared by the layers of a step.
    """

    borders: Sequence[Borders]
    lo: Tensor
    hi: Tensor
    sinks: Tensor
    upto: Tensor
    tail: Tensor
    span: Tensor
    recalls: Tensor
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def queries(self) -> int:
        return self.span.shape[0]

    @property
    def levels(self) -> int:
        return self.tail.shape[0]

    def forgetting(self) -> Step:
        """The same tokens where none recalls, as in the first layer."""
        return self.memo("forgetting", lambda: replace(self, recalls=torch.zeros_like(self.recalls), plans={}))

    def later(self, tokens: int) -> Step:
        """The raw tokens that stand so many raw tokens, and no gist, after these."""
        more = torch.zeros_like(self.hi)
        more[-1] = tokens
        return replace(self, hi=self.hi + more, upto=self.upto + more, span=self.span + tokens, plans={})

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time this key was asked for."""
        if key not in self.plans:
            self.plans[key] = make()
        return self.plans[key]
