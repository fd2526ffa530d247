"""One sequence over several ranks: each holds a contiguous part of every interleaved sample.

``gists`` sends what the method lets later ranks see and nothing else: gists, sinks and the raw tokens of the last chunks
before a border. Each rank gathers these keys and values once per layer (one differentiable all-gather), puts them before
its own and attends over that short sequence with the ordinary operation, whose ranges are mapped row by row; so it is
exact by construction. ``ulysses`` is DeepSpeed-Ulysses: it trades the sequence for heads, and any attention runs unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.intervals import Intervals
from model.gist import Layout, Recall
from model.tensor_parallel import gather_sequence

METHODS = ("gists", "ulysses")


@dataclass(frozen=True)
class ContextParallel:
    """How the sequence is spread: the group, in the order of the parts, and the method."""

    group: ProcessGroup
    method: str

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's contiguous part of a tensor that covers whole samples along ``dim``."""
        assert x.shape[dim] % self.group.size() == 0, "the padded length is a multiple of the ranks"
        return x.chunk(self.group.size(), dim)[self.group.rank()]

    def plan(self, layout: Layout) -> ExchangePlan:
        """Who sends what in a micro-batch; made once, shared by its layers."""
        key = ("context parallel", self.group.size(), self.group.rank())
        return layout.intervals.memo(key, lambda: make_plan(layout, self.group.rank(), self.group.size()))


@dataclass(frozen=True)
class ContextAttention:
    """Attention of this rank's queries over whole sequences that are spread over the ranks.

    Attributes:
        context: how they are spread.
        make: (layout, recall) -> attention (layer index, q, k, v) -> out among tokens that are all here.
        layout, recall: of the whole samples, alike on all ranks.
    """

    context: ContextParallel
    make: Callable
    layout: Layout
    recall: Recall | None

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T / n, H, D], k, v [B, T / n, Hkv, D] -> [B, T / n, H, D], all of this rank's part."""
        if self.context.method == "ulysses":
            from deepspeed.sequence.layer import DistributedAttention

            whole = self.make(self.layout, self.recall)
            return DistributedAttention(lambda *qkv: whole(index, *qkv), self.context.group)(q, k, v, 0)
        assert self.recall is None, "recall reads chunks that gists alone do not bring here; the configuration refuses it"
        plan = self.context.plan(self.layout)
        keys_values = torch.cat([k, v], 2)  # [B, T / n, 2 Hkv, D]
        received = gather_sequence(_take(keys_values, plan.exported)[None], self.context.group)  # [n, B, E, 2 Hkv, D]
        pool = torch.cat([keys_values, received.transpose(0, 1).flatten(1, 2)], 1)
        k_near, v_near = _take(pool, plan.source).split(k.shape[2], 2)
        blank = q.new_zeros(q.shape[0], 1, *q.shape[2:])
        q_near = _take(torch.cat([q, blank], 1), plan.query_source)
        out = self.make(plan.layout, None)(index, q_near, k_near.contiguous(), v_near.contiguous())
        return _take(out, plan.own)


@dataclass(frozen=True)
class ExchangePlan:
    """What one rank sends and reads in a micro-batch. N is the length of the short sequence, E the most any rank sends.

    Attributes:
        exported: [B, E] int64, tokens of this rank's part that others see; the rest repeats one of them.
        source: [B, N] int64, where each token of the short sequence lies in (own part, then the n ranks' exports).
        query_source: [B, N] int64, the same for queries; others' tokens ask nothing and read a blank row.
        own: [B, T / n] int64, places of this rank's tokens in the short sequence.
        layout: intervals of the short sequence (its levels and positions are not used).
        tokens_sent, tokens_held: of this rank per sample: sent to each other rank, and held.
    """

    exported: Tensor
    source: Tensor
    query_source: Tensor
    own: Tensor
    layout: Layout
    tokens_sent: int
    tokens_held: int


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, h, D], index [B, N] -> [B, N, h, D]"""
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[batch, index]


def _seen_tokens(intervals: Intervals, start: int, stop: int) -> Tensor:
    """bool [B, T], the tokens that the queries ``[start, stop)`` see."""
    batch, rows = intervals.rows.shape
    lo, hi = (x[:, :, start:stop].flatten(1).long() for x in (intervals.lo, intervals.hi))
    edges = torch.zeros(batch, rows + 1, dtype=torch.int32, device=lo.device)
    one = torch.ones_like(lo, dtype=torch.int32)
    edges.scatter_add_(1, lo, one).scatter_add_(1, hi, -one)
    seen_rows = edges.cumsum(1)[:, :rows] > 0
    seen = torch.zeros(batch, intervals.tokens, dtype=torch.int32, device=lo.device)
    return seen.scatter_add_(1, intervals.rows, seen_rows.int()) > 0


def _padded_indices(masks: Tensor, length: int) -> Tensor:
    """bool [.., T] -> int64 [.., length], the places of True in order, filled up with the first place."""
    order = (~masks).int().argsort(dim=-1, stable=True)[..., :length]
    place = torch.arange(length, device=masks.device)
    return torch.where(place < masks.sum(-1, keepdim=True), order, order[..., :1])


def make_plan(layout: Layout, rank: int, size: int) -> ExchangePlan:
    """The plan of one rank; every rank derives it from the whole layout, so nothing needs to be negotiated."""
    intervals = layout.intervals
    batch, tokens = intervals.batch, intervals.tokens
    held = tokens // size
    index = torch.arange(tokens, device=intervals.rows.device)
    home = index // held  # the rank that holds a token
    needs = torch.stack([_seen_tokens(intervals, r * held, (r + 1) * held) for r in range(size)])  # [n, B, T]
    foreign = needs & (home != torch.arange(size, device=index.device)[:, None])[:, None]
    exports = foreign.any(0)  # [B, T], seen by another rank than its own
    by_rank = torch.stack([exports & (home == r) for r in range(size)])  # [n, B, T]
    most = max(1, int(by_rank.sum(-1).max()))
    exported = _padded_indices(by_rank[rank], most)
    exported = torch.where(by_rank[rank].any(-1, keepdim=True), exported - rank * held, 0)

    mine = home == rank
    kept = foreign[rank] | mine
    length = int(kept.sum(-1).max())
    near = _padded_indices(kept, length)  # [B, N] token of each place
    place_in_export = exports.cumsum(-1) - 1 - torch.cat(
        [torch.zeros(batch, 1, dtype=torch.int64, device=index.device), by_rank.sum(-1).cumsum(0).T[:, :-1]], 1
    ).gather(1, home.expand(batch, -1))
    remote = held + home * most + place_in_export
    source = torch.where(mine, index - rank * held, remote).gather(1, near)
    is_own = mine[near] & (torch.arange(length, device=index.device) < kept.sum(-1, keepdim=True))
    query_source = torch.where(is_own, near - rank * held, held)
    compact = kept.cumsum(-1) - 1  # [B, T] place of each kept token
    own = compact[:, rank * held : (rank + 1) * held]
    short = _shorten(intervals, kept, compact, length, own, rank * held)
    near_layout = Layout(layout.level.gather(1, near), layout.doc.gather(1, near), layout.position.gather(1, near), short)
    sent = int(by_rank[rank].sum(-1).max())
    return ExchangePlan(exported, source, query_source, own, near_layout, sent, held)


def _shorten(intervals: Intervals, kept: Tensor, compact: Tensor, length: int, own: Tensor, first: int) -> Intervals:
    """The intervals of the kept tokens, in which only this rank's queries see anything.

    Rows keep their order, so a range that is kept whole stays a range: its ends are counts of kept rows before them.
    kept, compact: [B, T]; own: [B, T / n] places of this rank's queries, whose first token is ``first``.
    """
    batch, tokens = kept.shape
    levels = intervals.segments - 2
    device = kept.device
    token_rows = intervals.rows[:, :tokens]
    kept_rows = kept.gather(1, token_rows)
    count = torch.nn.functional.pad(kept_rows.cumsum(1), (1, 0))  # [B, T + 1] kept rows before a row
    # Places beyond a sample's kept tokens stand at the end of the raw segment and see nothing.
    rows = torch.arange(length, device=device).repeat(batch, 1)
    target = torch.where(kept_rows, count[:, :-1], length)  # dropped rows write into a spare last place
    spare = torch.cat([rows, rows[:, :1]], 1)
    rows = spare.scatter(1, target, compact.gather(1, token_rows))[:, :length]
    sink_tokens = intervals.rows[:, tokens:]
    sinks = torch.where(kept.gather(1, sink_tokens), compact.gather(1, sink_tokens), 0)
    row_of = torch.empty_like(rows).scatter_(1, rows, torch.arange(length, device=device).expand(batch, -1))

    held = own.shape[1]
    ends = []
    for bound in (intervals.lo, intervals.hi):
        mine = bound[:, :, first : first + held].long()  # [B, S, T / n]
        inner = count[:, None].expand(-1, levels + 1, -1).gather(2, mine[:, :-1])
        mapped = torch.cat([inner, mine[:, -1:] - tokens + length], 1).to(torch.int32)
        full = torch.zeros(batch, intervals.segments, length, dtype=torch.int32, device=device)
        ends.append(full.scatter_(2, own[:, None].expand(-1, intervals.segments, -1), mapped))
    start = count.gather(1, intervals.segment_start[:, : levels + 1].long())
    tail = torch.tensor([[length, length + sinks.shape[1]]], device=device).expand(batch, -1)
    segment_start = torch.cat([start, tail], 1).to(torch.int32)
    return Intervals(torch.cat([rows, sinks], 1), row_of, *ends, segment_start)
