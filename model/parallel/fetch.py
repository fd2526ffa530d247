"""Chunks that pass between ranks which share a sequence: who sends which raw tokens to whom, as a layer's selection decides.

Which tokens may pass is known with the layout: a *lack* is a token of a chunk that a rank does not have whole, but whose gist one
of its queries may select. So each rank lists the lacks of all ranks that it holds, its own ones by the ranks that hold them,
and the same in their order. A layer sets a flag for each entry whose chunk was selected, by one byte per level-0 gist and
rank; one running sum of the flags then tells what is sent, where what arrives stands, and how much it is. Of all that, the
host reads how many tokens pass to and from each rank, once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from unfold.kernels.common.plans import Numbers
from unfold.kernels.tree import GistTree
from unfold.model.parallel.division import Homes


@dataclass(frozen=True)
class Lacks:
    """What may pass to and from one rank, of n; made once per micro-batch. O tokens it may send, M it may get.

    Attributes:
        flag: [O + 2 M] int64, which of the flags [n, B, chunks] of all ranks says whether an entry passes. Entries: the lacks of
            each rank that this one holds, by (rank, sample, token); its own, by (rank that holds them, sample, token); its own
            by (sample, token).
        send: [O] int64, tokens of this rank's part as ``sample * T / n + place``.
        arrive: [M] int64, of every own lack by (sample, token) its entry among those by rank.
        ends: [2 n] int64, after the last entry of every rank that gets tokens, then of every one that sends them.
        gist: [G] int64, of every chunk that this rank lacks, where the short tree has its gist, ``sample * N + row``.
        first: [G] int64, the chunk's first entry among the own lacks by (sample, token).
        base: [G] int64, the row of its sample in which what stands apart begins.
        width: [G] int32, raw tokens of the chunk.
    """

    flag: Tensor
    send: Tensor
    arrive: Tensor
    ends: Tensor
    gist: Tensor
    first: Tensor
    base: Tensor
    width: Tensor


def chunk_of_token(tree: GistTree) -> tuple[Tensor, int]:
    """The number of every token's chunk among those of its sample, [B, T] int64, -1 for none; the most chunks of a sample."""
    intervals, levels = tree.others, tree.levels
    first, last = intervals.segment_start[:, levels - 1 : levels + 1, None].long().unbind(1)
    closed_by = tree.parent.gather(1, intervals.row_of).long()  # [B, T] by token
    begins = tree.child_lo.gather(1, closed_by.clamp(min=0))  # sinks come before it
    inside = (closed_by >= 0) & (intervals.row_of >= torch.maximum(last, begins))
    return torch.where(inside, closed_by - first, -1), int((last - first).max())


def find_lacks(tree: GistTree, has: Tensor, recalls: Tensor) -> Tensor:
    """bool [n, B, T], what each rank may come to fetch: tokens of chunks that it does not have whole, though it has their gist.

    Args:
        tree: of the whole samples.
        has: bool [n, B, T], the tokens that each rank has.
        recalls: bool [n], whether any query of a rank recalls.
    """
    chunk, chunks = chunk_of_token(tree)
    inside = chunk >= 0
    column = torch.where(inside, chunk, chunks).expand(has.shape)  # the last one stands for tokens in none
    incomplete = torch.zeros(*has.shape[:2], chunks + 1, dtype=torch.int32, device=has.device)
    incomplete.scatter_add_(2, column, (inside & ~has).int())
    gist = tree.others.rows.gather(1, tree.others.segment_start[:, tree.levels - 1, None] + chunk.clamp(min=0))  # [B, T] tokens
    return (incomplete.gather(2, column) > 0) & inside & has.gather(2, gist.expand(has.shape)) & recalls[:, None, None]


def make_lacks(tree: GistTree, lacks: Tensor, homes: Homes, rank: int, short: GistTree, gist_row: Tensor) -> Lacks:
    """Those of one rank.

    Args:
        tree: of the whole samples.
        lacks: bool [n, B, T], of all ranks.
        homes: where each token is held.
        rank: this one.
        short: the tree of the tokens that it has.
        gist_row: [B, chunks] int64, the row of each chunk's gist there, if it has it.
    """
    size, batch, _ = lacks.shape
    chunk, chunks = chunk_of_token(tree)
    held = homes.tokens_of(rank)
    asker, sample, place = homes.by_rank(lacks)[:, :, rank].nonzero(as_tuple=True)
    offers = (asker * batch + sample) * chunks + chunk[sample, held[place]]
    own = lacks[rank]
    home, lack_sample, there = homes.by_rank(own).transpose(0, 1).nonzero(as_tuple=True)
    token = homes.order[home * homes.held + there]
    flat = lack_sample * homes.at.numel() + token
    arrive = flat.argsort()
    own_flag = rank * batch * chunks + lack_sample * chunks + chunk[lack_sample, token]
    counts = torch.cat([torch.bincount(asker, minlength=size), torch.bincount(home, minlength=size)])

    of_chunk = own_flag[arrive] - rank * batch * chunks  # sample * chunks + chunk, ascending
    number, width = of_chunk.unique_consecutive(return_counts=True)
    owner, rows = number // chunks, short.others.rows.shape[1]
    return Lacks(
        torch.cat([offers, own_flag, own_flag[arrive]]),
        sample * homes.held + place,
        len(offers) + arrive,
        counts.cumsum(0),
        owner * short.others.tokens + gist_row.flatten()[number],
        len(offers) + len(own_flag) + width.cumsum(0) - width,
        (batch - owner) * rows,
        width.int(),
    )


def with_room(short: GistTree, lacks: Lacks) -> GistTree:
    """The tree in which chunks that are lacking stand apart, all of them: how wide each is, plans ask of it."""
    after = lacks.width.cumsum(0)
    return _with_children(short, lacks, lacks.base + after - lacks.width)


def _with_children(tree: GistTree, lacks: Lacks, first: Tensor) -> GistTree:
    """The tree with the children of the lacking chunks from the rows ``first`` [G] on."""
    first = first.int()
    put = lambda x, values: x.flatten().index_copy(0, lacks.gist, values).view_as(x)
    return replace(tree, child_lo=put(tree.child_lo, first), child_hi=put(tree.child_hi, first + lacks.width))


@dataclass(frozen=True)
class Fetch:
    """What passes in one layer.

    Attributes:
        send: [sent] int64, tokens of this rank's part, in the order of the ranks that get them.
        sent, received: tokens to and from each rank; to itself those of chunks that a border cuts.
        order: [received] int64, which of what arrives stands in each apart row.
        tree: with the chunks where they then stand; the others' children are anywhere.
    """

    send: Tensor
    sent: list[int]
    received: list[int]
    order: Tensor
    tree: GistTree


class Asked:
    """What all ranks selected in one layer: the sizes are on their way to the host.

    lacks: of this rank; short: its tree, from :func:`with_room`; wanted: uint8 [n * B * chunks], the flags of all ranks.
    """

    def __init__(self, lacks: Lacks, short: GistTree, wanted: Tensor):
        self._lacks, self._short = lacks, short
        self._flags = wanted.index_select(0, lacks.flag)
        self._before = F.pad(self._flags.cumsum(0), (1, 0))  # flags that are set before each entry, int64
        self._sizes = Numbers(self._before.index_select(0, lacks.ends))

    def fetch(self) -> Fetch:
        """Waits for the sizes."""
        lacks = self._lacks
        upto = self._sizes.read()
        counts = [after - before for before, after in zip([0, *upto], upto)]
        ranks, offered, own = len(counts) // 2, len(lacks.send), len(lacks.arrive)
        sent, received = counts[:ranks], counts[ranks:]
        given, got = sum(sent), sum(received)
        # Entries that are set, one after another; place 0 takes all others.
        place = self._before[1:] * self._flags
        found = place.new_empty(1 + given + 2 * got)
        found.scatter_(0, place[:offered], lacks.send)
        found.scatter_(0, place[offered + own :], self._before.index_select(0, lacks.arrive) - given)
        at = self._before.index_select(0, lacks.first) + lacks.base - (given + got)
        return Fetch(found[1 : 1 + given], sent, received, found[1 + given + got :], _with_children(self._short, lacks, at))


class ExchangeRows(torch.autograd.Function):
    """Rows to the ranks that asked for them; backward brings their gradients home, where they are summed in rank order."""

    @staticmethod
    def forward(ctx, rows: Tensor, fetch: Fetch, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(fetch.send)
        ctx.sent, ctx.received, ctx.group, ctx.shape = fetch.sent, fetch.received, group, rows.shape
        received = rows.new_empty(sum(fetch.received), *rows.shape[1:])
        dist.all_to_all_single(received, rows.index_select(0, fetch.send), fetch.received, fetch.sent, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor):
        (send,) = ctx.saved_tensors
        returned = grad.new_empty(len(send), *ctx.shape[1:])
        dist.all_to_all_single(returned, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for index, part in zip(send.split(ctx.sent), returned.split(ctx.sent)):
            total.index_add_(0, index, part.to(total.dtype))  # to one rank no row goes twice: the sum has one order
        return total.to(grad.dtype), None, None
