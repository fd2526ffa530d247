"""Recall over sequences that are spread over ranks: every rank selects for its own queries, then fetches what it unfolds.

Gists of every level are gathered with their values, for a query may select any gist before it; so are windows and sinks. What
a rank has then is a short sequence of its own, over which the ordinary operations run on a tree with the same gists: exact
by construction. Of the chunks behind the selected gists a rank asks those that it does not have
(:mod:`unfold.model.parallel.fetch`). Their rows travel in one all-to-all, and their gradients take the way back; they stand
apart from the short sequence, behind it, so that whatever was worked out for a micro-batch holds in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from unfold.kernels.compressed import compressed_attention
from unfold.kernels.select import Selection, SelectRule, chosen_gists
from unfold.kernels.select.blocks import BlockLists
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold import (
    ListStats,
    RecallStats,
    prepare_recall,
    recall_stats,
    select_to_unfold,
    unfold_attention,
)
from unfold.model.parallel.division import Division
from unfold.model.parallel.fetch import Asked, ExchangeRows, Lacks, find_lacks, make_lacks, with_room
from unfold.model.parallel.rows import Exports, Kept, had, queries_among, seen_by, seen_tokens


@dataclass(frozen=True)
class RecallPlan:
    """What one rank has before anything is selected; made once per micro-batch. N places, as in :class:`Kept`.

    Attributes:
        exports: what is gathered.
        near: [B * N] int64, where each token that is here afterwards lies in all samples' (own part, then the n ranks' exports).
        own: [B, T / n] int64, places of this rank's tokens.
        short: the tree of the tokens that are here, with this rank's queries. Chunks that are not whole here have room apart.
        queries: [n] int64, the recalling queries as ``sample * T / n + token`` of this rank's part.
        share: this rank's part of all recalling queries of the micro-batch, times the ranks.
        gists: level-0 gists of the short tree, of the sample that has most.
        marked: [B * chunks] int64, where each chunk of the whole samples stands among the short tree's [B * gists]; behind them
            if its gist is not here.
        lacks: raw tokens that may be fetched; None where all know that no rank fetches any.
    """

    exports: Exports
    near: Tensor
    own: Tensor
    short: GistTree
    queries: Tensor
    share: float
    gists: int
    marked: Tensor
    lacks: Lacks | None


def make_recall_plan(tree: GistTree, division: Division, rank: int) -> RecallPlan:
    """The plan of one rank, from the tree of the whole samples."""
    intervals, homes = tree.others, division.homes(tree.device)
    tokens, levels = intervals.tokens, tree.levels
    parts = [queries_among(tree, homes.rank == r) for r in range(division.ranks)]
    seen = []
    for r, part in enumerate(parts):
        sample = (part.tokens // tokens).repeat(levels + 2)
        recalled = seen_tokens(intervals, sample, part.lo.flatten(), part.hi.flatten())
        seen.append(seen_by(intervals, homes.tokens_of(r)) | recalled)
    seen = torch.stack(seen)
    exports, has = Exports.of(seen, homes, rank), had(seen, homes)
    kept = Kept.of(has[rank], intervals, homes.tokens_of(rank))
    mine, short = parts[rank], kept.tree(parts[rank])
    queries = mine.tokens // tokens * homes.held + homes.place[mine.tokens % tokens]
    share = division.ranks * mine.queries / max(1, tree.queries)  # none where all unfold everything

    gist_row, marked, gists = _gists_here(tree, kept, short)
    lacks = find_lacks(tree, has, torch.tensor([part.queries > 0 for part in parts], device=has.device))
    own = None
    if lacks.any():
        own = make_lacks(tree, lacks, homes, rank, short, gist_row)
        short = with_room(short, own)
    pool = homes.held + division.ranks * exports.exported.shape[1]  # tokens of a sample
    near = exports.source.gather(1, kept.near) + torch.arange(intervals.batch, device=has.device)[:, None] * pool
    return RecallPlan(exports, near.flatten(), kept.own, short, queries, share, gists, marked, own)


def _gists_here(tree: GistTree, kept: Kept, short: GistTree) -> tuple[Tensor, Tensor, int]:
    """Of every chunk [B, chunks] int64 the row of its gist in the short tree; ``marked`` and ``gists`` of :class:`RecallPlan`."""
    bounds = lambda x: x.others.segment_start[:, x.levels - 1 : x.levels + 1, None].long().unbind(1)  # two [B, 1]
    (first, last), (begin, end) = bounds(tree), bounds(short)
    batch, gists = len(first), int((end - begin).max())
    row = first + torch.arange(int((last - first).max()), device=first.device)
    gist_row = kept.target.gather(1, row.clamp(max=tree.others.tokens - 1))
    here = (row < last) & (gist_row < kept.length)
    origin = torch.arange(batch, device=first.device)[:, None] * gists
    marked = torch.where(here, origin + gist_row - begin, batch * gists)
    return gist_row, marked.flatten(), gists


class _Anchor(torch.autograd.Function):
    """Gives back the first tensor; its backward reaches the second one too, with zeros.

    A rank that unfolds nothing takes part in the exchange all the same, backward included.
    """

    @staticmethod
    def forward(ctx, out: Tensor, received: Tensor) -> Tensor:
        ctx.like = received.shape, received.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        shape, dtype = ctx.like
        return grad, grad.new_zeros(shape, dtype=dtype)


def prepare_over_ranks(plan: RecallPlan, rule: SelectRule, q: Tensor, k: Tensor) -> None:
    """Make ahead the plans that :func:`select_over_ranks` and unfolding will ask for.

    q, k: as of :func:`unfold.kernels.compressed.prepare_compressed`.
    """
    prepare_recall(q, k, plan.short, rule)


def wanted_chunks(plan: RecallPlan, selection: Selection | BlockLists) -> Tensor:
    """The chunks whose gists any of this rank's queries selected: uint8 [B * chunks], by number in the whole samples."""
    if not plan.short.queries:
        return torch.zeros(plan.marked.shape, dtype=torch.uint8, device=plan.marked.device)
    marks = chosen_gists(plan.short, selection, plan.gists)
    return torch.nn.functional.pad(marks.flatten(), (0, 1)).index_select(0, plan.marked)


@dataclass(frozen=True)
class Selected:
    """A layer's attention after its queries have selected. What lies between this and :meth:`unfold` hides a wait.

    Attributes:
        plan, group: of :func:`select_over_ranks`.
        q: [B, T / n, H, D].
        pool: [B, T / n + n E, 2 Hkv, D].
        recalling: [N, H, D], the recalling queries.
        k, v: [B, N, Hkv, D], of the short sequence.
        selection: of the recalling queries.
        asked: what all ranks want; None where nothing is fetched.
        told: bytes that this rank told the others of what it wants.
    """

    plan: RecallPlan
    group: ProcessGroup
    q: Tensor
    pool: Tensor
    recalling: Tensor
    k: Tensor
    v: Tensor
    selection: Selection | BlockLists
    asked: Asked | None
    told: int

    def unfold(self) -> tuple[Tensor, RecallStats | ListStats, int]:
        """Attention of this rank's tokens.

        Returns:
            [B, T / n, H, D]; what this rank's queries read, weighted so that the mean over ranks is that of all queries; and the
            bytes that this rank sent.
        """
        plan, q, pool, tree, apart, sent = self.plan, self.q, self.pool, self.plan.short, None, self.told
        out = self._compressed()  # before the wait: the GPU has it to do
        if self.asked is not None:
            fetch = self.asked.fetch()
            # Read from the pool, not from this rank's keys: backward then cannot take the gathering before this exchange.
            received = ExchangeRows.apply(pool[:, : q.shape[1]].flatten(0, 1), fetch, self.group)
            out = _Anchor.apply(out, received)
            tree, apart = fetch.tree, received.index_select(0, fetch.order).chunk(2, 1)
            row = pool[0, 0].numel() * pool.element_size()
            sent += (sum(fetch.sent) - fetch.sent[self.group.rank()]) * row
        if not tree.queries:
            return out, RecallStats(torch.zeros((), device=q.device), torch.zeros(tree.levels, device=q.device)), sent
        rows = unfold_attention(self.recalling, self.k, self.v, tree, self.selection, apart=apart)
        out = out.flatten(0, 1).index_copy(0, plan.queries, rows).view_as(q)
        return out, recall_stats(tree, self.selection).weighted(plan.share), sent

    def _compressed(self) -> Tensor:
        """What the tokens see that do not recall: [B, T / n, H, D]."""
        own = self.plan.own[..., None, None].expand(-1, -1, *self.q.shape[2:])
        q_near = self.q.new_zeros(*self.k.shape[:2], *self.q.shape[2:]).scatter(1, own, self.q)
        return compressed_attention(q_near, self.k, self.v, self.plan.short.others).gather(1, own)


def select_over_ranks(plan: RecallPlan, rule: SelectRule, q: Tensor, pool: Tensor, group: ProcessGroup) -> Selected:
    """Select for this rank's queries, and tell all ranks; :meth:`Selected.unfold` then attends.

    Args:
        plan: of this rank.
        rule: of the selection.
        q: [B, T / n, H, D], this rank's.
        pool: [B, T / n + n E, 2 Hkv, D], keys and values: this rank's, then what was gathered.
        group: the context-parallel group.
    """
    near = pool.flatten(0, 1).index_select(0, plan.near).unflatten(0, (len(pool), -1))
    k, v = (x.contiguous() for x in near.chunk(2, 2))
    recalling = q.flatten(0, 1).index_select(0, plan.queries)
    selection, asked, told = select_to_unfold(recalling, k, plan.short, rule), None, 0
    if plan.lacks is not None:
        wanted = wanted_chunks(plan, selection)
        everyone = wanted.new_empty(group.size() * len(wanted))
        dist.all_gather_into_tensor(everyone, wanted, group=group)
        asked, told = Asked(plan.lacks, plan.short, everyone), (group.size() - 1) * len(wanted)
    return Selected(plan, group, q, pool, recalling, k, v, selection, asked, told)
