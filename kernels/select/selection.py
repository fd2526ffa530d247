"""What is selected and by which rule; shared by every backend, training and decoding (docs/method.md#selection)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SelectRule:
    """How many gists a query selects per level, and how the heads of a KV group share.

    The adaptive budget is the default. A fixed ``topk`` and ``top_p`` stand in its place with everything that belongs to it:
    the cap of a quarter of a level's gists is a part of the adaptive budget and applies to neither (a ``topk`` that is
    large enough selects everything).

    Attributes:
        ratio, chunk: of the adaptive budget ``T // (ratio * r * chunk) + 1``, r being query heads per KV head.
        topk: a fixed number of gists per level, or None.
        top_p: the fewest candidates of a level whose softmax reaches this share, or None. The softmax is that of the
            scaled scores, so that the share is one of attention; summed scores (``share='group'``) are scaled alike.
        share: 'head': every query head selects, and the group reads the union; 'group': one selection by the summed scores.
        everything: every gist of every level is selected. It wins over all budgets, and heads share one selection, since all of
            them would make the same. Lists of what is selected then have the size of dense attention.
    """

    ratio: int
    chunk: int
    topk: int | None = None
    top_p: float | None = None
    share: str = "head"
    everything: bool = False

    def __post_init__(self):
        if self.everything:
            for name, value in (("topk", None), ("top_p", None), ("share", "group")):
                object.__setattr__(self, name, value)
        if self.share not in ("head", "group"):
            raise ValueError(f"share: {self.share!r} is not one of head, group")
        if self.topk is not None and self.top_p is not None:
            raise ValueError(f"topk, top_p: {self.topk} and {self.top_p} are both set; set one of them")

    def budget(self, span: Tensor, gists: Tensor, group: int) -> Tensor:
        """Gists to select, for any shape of queries (top-p does not use it).

        Args:
            span: int, interleaved tokens of the query's document up to and including the query.
            gists: int, same shape, gists of the level before the query in its document.
            group: query heads per KV head.

        Returns:
            Same shape and dtype as ``span``, at least 1.
        """
        if self.everything:
            return gists.clamp(min=1).to(span.dtype)
        if self.topk is not None:
            return torch.full_like(span, self.topk)
        adaptive = span // (self.ratio * group * self.chunk) + 1
        return adaptive.minimum((gists // 4).clamp(min=1))


@dataclass(frozen=True)
class Selection:
    """The gists that each query and KV head selected: per level a list of rows for every (query, KV head).

    Attributes:
        rows: per segment (0 is the top level), [n] int32, rows of the level-sorted buffer of the query's sample: those of
            query 0 head 0, of query 0 head 1, .., each list ascending, none twice.
        start: per segment, [N * Hkv + 1] int64; the list of query n and KV head h is ``rows[start[i] : start[i + 1]]`` with
            i = n * Hkv + h.
        kv_heads: Hkv.
    """

    rows: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    kv_heads: int

    def of(self, segment: int, query: int, kv_head: int) -> Tensor:
        """[k] int32, the rows that one query and KV head selected in a segment."""
        i = query * self.kv_heads + kv_head
        return self.rows[segment][self.start[segment][i] : self.start[segment][i + 1]]


def take_best(scores: Tensor, candidates: Tensor, budget: Tensor, top_p: float | None = None) -> Tensor:
    """The best candidates of each row; of equal ones the first. The one place where gists are compared.

    Args:
        scores: [.., n, W] float, the gists along W in the order of their document.
        candidates: bool, broadcastable to ``scores``.
        budget: [n] int, candidates to take; all of them where there are fewer.
        top_p: take instead the fewest whose softmax reaches this.

    Returns:
        bool, shape of ``scores``.
    """
    scores = scores.masked_fill(~candidates, -torch.inf)
    if top_p is not None:
        # The gists before an item in the order of selection fall short of p exactly for those that are needed.
        best, order = scores.sort(dim=-1, descending=True, stable=True)
        share = best.softmax(-1)
        needed = (share.cumsum(-1) - share < top_p) & (best > -torch.inf)
        return torch.zeros_like(needed).scatter_(-1, order, needed)
    width = scores.shape[-1]
    budget = budget.clamp(max=width)
    most = scores.topk(int(budget.max()), -1).values
    last = most.gather(-1, (budget - 1).long()[:, None].expand(*scores.shape[:-1], 1))  # [.., n, 1]
    taken = (scores >= last) & (scores > -torch.inf)
    # top-k orders equal scores at will: where they made the list too long, keep the earlier ones.
    surplus = (taken.sum(-1) > budget).nonzero(as_tuple=True)
    if len(surplus[0]):
        tied, bound = scores[surplus], last[surplus]  # [rows, W], [rows, 1]
        better, equal = tied > bound, tied == bound
        room = budget.expand(scores.shape[:-1])[surplus][:, None] - better.sum(-1, keepdim=True)
        taken[surplus] = better | (equal & (equal.cumsum(-1) <= room))
    return taken
