"""Recall over sequences that are spread over ranks: every rank selects for its own queries, then fetches what it unfolds.

Gists of every level are gathered with their values, for a query may select any gist before it; so are windows and sinks. Of
the chunks behind the selected gists a rank asks those it does not have: one byte per level-0 gist tells all ranks
who wants which, from which each knows what it sends to whom. The rows then travel in one all-to-all, and their gradients
take the way back. What a rank has then is a short sequence of its own, over which the ordinary operations run on a tree with
the same gists: exact by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from unfold.kernels.compressed import compressed_attention, prepare_compressed
from unfold.kernels.select import Selection, SelectRule, prepare_select, select_gists
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold import RecallStats, unfold_attention
from unfold.kernels.unfold.op import recall_stats
from unfold.model.parallel.division import Division, Homes
from unfold.model.parallel.rows import Exports, Kept, queries_among, seen_by, seen_tokens, take


@dataclass(frozen=True)
class RecallPlan:
    """What one rank has before anything is selected; made once per micro-batch. N places, as in :class:`Kept`.

    Attributes:
        exports, kept: what is gathered, and the tokens that are here afterwards.
        tree: of the whole sequence, with this rank's queries.
        short: the same of the kept tokens, to select with and for the tokens that do not recall.
        queries: [n] int64, the recalling queries as ``sample * T / n + token`` of this rank's part.
        share: this rank's part of all recalling queries of the micro-batch, times the ranks.
        chunk: [B, T] int64, by token: number of the level-0 gist (of its sample) that closed it; -1 for none.
        chunks: level-0 gists of the sample that has most.
        homes: where each token is held.
    """

    exports: Exports
    kept: Kept
    tree: GistTree
    short: GistTree
    queries: Tensor
    share: float
    chunk: Tensor
    chunks: int
    homes: Homes


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
    exports = Exports.of(torch.stack(seen), homes, rank)
    kept = Kept.of(exports.has[rank], intervals, homes.tokens_of(rank))
    mine = parts[rank]
    queries = mine.tokens // tokens * homes.held + homes.place[mine.tokens % tokens]

    first, last = intervals.segment_start[:, levels - 1 : levels + 1, None].long().unbind(1)
    closed_by = tree.parent.gather(1, intervals.row_of).long()  # [B, T] by token
    is_raw = intervals.row_of >= last
    chunk = torch.where(is_raw & (closed_by >= 0), closed_by - first, -1)
    share = division.ranks * mine.queries / max(1, tree.queries)  # none where all unfold everything
    return RecallPlan(exports, kept, mine, kept.tree(mine), queries, share, chunk, int((last - first).max()), homes)


def wanted_chunks(plan: RecallPlan, selection: Selection) -> Tensor:
    """The level-0 gists that any of this rank's queries selected: uint8 [B, chunks]."""
    tree = plan.short
    owner = torch.arange(len(selection.start[-1]) - 1, device=tree.tokens.device)
    owner = owner.repeat_interleave(selection.start[-1].diff()) // selection.kv_heads
    sample = tree.tokens[owner] // tree.others.tokens
    # The gists that are kept are those before some query; where they begin, documents before may have been dropped.
    row = plan.kept.by_row(torch.arange(plan.kept.mask.shape[1], device=sample.device).expand_as(plan.kept.mask), 0)
    number = row[sample, selection.rows[-1].long()] - plan.tree.others.segment_start[sample, tree.levels - 1]
    wanted = torch.zeros(tree.others.batch, plan.chunks, dtype=torch.uint8, device=sample.device)
    wanted[sample, number] = 1
    return wanted


@dataclass(frozen=True)
class Fetch:
    """Which raw tokens pass between the ranks in one layer.

    Attributes:
        send: [sent] int64, tokens of this rank's part as ``sample * T / n + token``, in the order of the ranks that get them.
        sent, received: tokens to and from each rank.
        arrived: bool [B, T], the tokens that this rank gets, ordered by (rank they come from, sample, token).
        rows: [B, T] int64, where each of those stands among what is received.
        moves: tokens between any two ranks: where it is 0, all know that nothing is exchanged.
    """

    send: Tensor
    sent: list[int]
    received: list[int]
    arrived: Tensor
    rows: Tensor
    moves: int


def make_fetch(plan: RecallPlan, wanted: Tensor, rank: int) -> Fetch:
    """wanted: uint8 [n, B, chunks], of all ranks. Every rank derives the same numbers from it."""
    size, homes = len(wanted), plan.homes
    padded = torch.nn.functional.pad(wanted, (0, 1)) > 0  # the last column stands for tokens that no chunk holds
    column = torch.where(plan.chunk >= 0, plan.chunk, plan.chunks)
    missing = padded.gather(2, column.expand(size, -1, -1)) & ~plan.exports.has  # [n, B, T]
    by_home = homes.by_rank(missing)  # [n, B, n, T / n]
    counts = by_home.sum((1, 3)).tolist()  # [to][from]
    _, sample, place = by_home[:, :, rank].nonzero(as_tuple=True)
    from_home = by_home[rank].transpose(0, 1)  # [n, B, T / n]
    rows = homes.by_token((from_home.flatten().cumsum(0) - 1).view_as(from_home).transpose(0, 1))
    sent = [row[rank] for row in counts]
    return Fetch(sample * homes.held + place, sent, counts[rank], missing[rank], rows, sum(map(sum, counts)))


class _ExchangeRows(torch.autograd.Function):
    """Rows to the ranks that asked for them; backward brings their gradients home, where they are summed in rank order."""

    @staticmethod
    def forward(ctx, rows: Tensor, fetch: Fetch, group: ProcessGroup) -> Tensor:
        ctx.fetch, ctx.group, ctx.shape = fetch, group, rows.shape
        received = rows.new_empty(sum(fetch.received), *rows.shape[1:])
        dist.all_to_all_single(received, rows.index_select(0, fetch.send), fetch.received, fetch.sent, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor):
        fetch = ctx.fetch
        returned = grad.new_empty(len(fetch.send), *ctx.shape[1:])
        dist.all_to_all_single(returned, grad.contiguous(), fetch.sent, fetch.received, group=ctx.group)
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for index, part in zip(fetch.send.split(fetch.sent), returned.split(fetch.sent)):
            total.index_add_(0, index, part.to(total.dtype))  # to one rank no row goes twice: the sum has one order
        return total.to(grad.dtype), None, None


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
    """Make ahead the plans that :func:`recall_over_ranks` will ask for; what is unfolded a layer decides by itself.

    q, k: as of :func:`unfold.kernels.compressed.prepare_compressed`.
    """
    prepare_compressed(q, k, plan.short.others)
    prepare_select(q, k, plan.short, rule)


def recall_over_ranks(
    plan: RecallPlan, rule: SelectRule, q: Tensor, pool: Tensor, group: ProcessGroup
) -> tuple[Tensor, RecallStats, int]:
    """Attention of this rank's tokens where some recall.

    Args:
        plan: of this rank.
        rule: of the selection.
        q: [B, T / n, H, D], this rank's.
        pool: [B, T / n + n E, 2 Hkv, D], keys and values: this rank's, then what was gathered.
        group: the context-parallel group.

    Returns:
        [B, T / n, H, D]; what this rank's queries read, weighted so that the mean over ranks is that of all queries; and the
        bytes that this rank sent.
    """
    kept, tree, held = plan.kept, plan.short, plan.homes.held
    k, v = take(pool, plan.exports.source.gather(1, kept.near)).chunk(2, 2)
    k, v = k.contiguous(), v.contiguous()
    own = kept.own[..., None, None].expand(-1, -1, *q.shape[2:])
    q_near = q.new_zeros(q.shape[0], kept.length, *q.shape[2:]).scatter(1, own, q)
    out = compressed_attention(q_near, k, v, tree.others).gather(1, own)
    recalling = q.flatten(0, 1).index_select(0, plan.queries)
    selection = select_gists(recalling, k, tree, rule)

    wanted = wanted_chunks(plan, selection)
    everyone = wanted.new_empty(group.size() * len(wanted), plan.chunks)
    dist.all_gather_into_tensor(everyone, wanted, group=group)
    fetch = make_fetch(plan, everyone.view(group.size(), *wanted.shape), group.rank())
    if fetch.moves:
        # Read from the pool, not from this rank's keys: backward then cannot take the gathering before this exchange.
        received = _ExchangeRows.apply(pool[:, :held].flatten(0, 1), fetch, group)
        tree, k, v = _with_fetched(plan, fetch, pool, received)
        out = _Anchor.apply(out, received)
    stats = RecallStats(torch.zeros((), device=q.device), torch.zeros(tree.levels, device=q.device))
    if tree.queries:
        rows = unfold_attention(recalling, k, v, tree, selection)
        out = out.flatten(0, 1).index_copy(0, plan.queries, rows).view_as(q)
        read = recall_stats(tree, selection)
        stats = RecallStats(read.unfolded * plan.share, read.selected * plan.share)
    row = pool[0, 0].numel() * pool.element_size()
    return out, stats, sum(fetch.sent) * row + (group.size() - 1) * wanted.numel()


def _with_fetched(plan: RecallPlan, fetch: Fetch, pool: Tensor, received: Tensor) -> tuple[GistTree, Tensor, Tensor]:
    """The tree of all that is here now, whose gists stand in the rows of ``plan.short``, and its keys and values."""
    batch, places = pool.shape[:2]
    kept = Kept.of(plan.kept.mask | fetch.arrived, plan.tree.others, plan.kept.tokens)
    sample = torch.arange(batch, device=pool.device)[:, None]
    source = torch.where(fetch.arrived, batch * places + fetch.rows, sample * places + plan.exports.source)
    every = torch.cat([pool.flatten(0, 1), received])
    near = source.gather(1, kept.near)
    k, v = every.index_select(0, near.flatten()).view(*near.shape, *pool.shape[2:]).chunk(2, 2)
    return kept.tree(plan.tree), k.contiguous(), v.contiguous()
