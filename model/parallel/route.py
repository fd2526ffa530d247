"""The routing loss over sequences that are spread over ranks: every rank scores its own keys against all sampled queries.

The queries are few, so all ranks get them. A teacher's softmax, and a student's, then need the largest score and the sum of
exponentials of all ranks. Chunk masses stay where their gists are; a group that is open at the end of a slice hands what of
its mass lies there to the rank that holds its gist, one number per level, query and head. No collective is differentiated:
only gists get a gradient, each on the rank that holds it, and forward knows it. Exact but for the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from unfold.kernels.route import Routed
from unfold.kernels.route.cpu import Hidden, columns_of, masses, rows_of, segment_keys, student_loss, student_scores, teacher
from unfold.kernels.route.gradient import wants_gradient, with_gradient
from unfold.kernels.route.rows import RoutedBlock, SampleRows, rows_here
from unfold.kernels.tree import GistTree
from unfold.model.parallel.division import Division


@dataclass(frozen=True)
class RankPlan:
    """What one rank knows of a micro-batch before anything is scored; M sampled queries in all, n ranks of at most S slices each.

    Attributes:
        rows: per slice of its own, what it holds of every sample.
        starts: per slice the tokens before it, less those of the rank's slices before it: a token's place is that much less.
        mine: [m] int64, the sampled queries of its own part as ``sample * T / n + place``.
        most: sampled queries of the rank that has most.
        order: [M] int64, where each query lies among what is gathered, ``rank * most + number``.
        adds: [own slices, n, S, L, M] fp32, 1 where the open group of another slice (rank, slice) is closed, in a gist segment,
            by the first gist there of an own slice, by the query's sample.
        tokens: [B, T / n] int64, places of the tokens of its part: the gists of its slices, each sorted by level, then the
            raw tokens.
    """

    rows: tuple[list[SampleRows], ...]
    starts: tuple[int, ...]
    mine: Tensor
    most: int
    order: Tensor
    adds: Tensor
    tokens: Tensor


def rank_plan(routed: Routed, group: int, division: Division, rank: int, device: torch.device) -> RankPlan:
    """The (memoised) plan of one rank, from the whole samples, which all ranks know.

    group: query heads per KV head; device: where scores are computed.
    """
    make = lambda whole: _rank_plan(whole, group, division, rank, device)
    return routed.planned(("routing over ranks", group, division, rank), make)


def _rank_plan(routed: Routed, group: int, division: Division, rank: int, device: torch.device) -> RankPlan:
    tree, homes = routed.tree, division.homes(routed.device)
    spans = division.spans[rank]
    own = [rows_of(routed, group, span, device) for span in spans]
    sample, token = tree.tokens // tree.others.tokens, tree.tokens % tree.others.tokens
    home = homes.rank[token]
    is_home = home == torch.arange(division.ranks, device=home.device)[:, None]  # [n, M]
    number = (is_home.cumsum(1) - 1).gather(0, home[None])[0]
    most = int(is_home.sum(1).max())
    mine = is_home[rank].nonzero()[:, 0]
    lengths = accumulate((stop - start for start, stop in spans), initial=0)
    starts = tuple(start - before for (start, _), before in zip(spans, lengths))
    return RankPlan(
        tuple(own),
        starts,
        sample[mine] * division.held + homes.place[token[mine]],
        most,
        home * most + number,
        _adds(tree, own, division, rank).to(home.device)[..., sample],
        torch.stack([_tokens_by_level(tree, own, starts, b) for b in range(tree.others.batch)]),
    )


def _adds(tree: GistTree, own: list[list[SampleRows]], division: Division, rank: int) -> Tensor:
    """``adds`` by sample: [own slices, n, S, L, B]."""
    adds = torch.zeros(len(own), division.ranks, division.slices, tree.levels, tree.others.batch)
    for other, spans in enumerate(division.spans):
        for j, span in enumerate(spans):
            for i, mine in enumerate(division.spans[rank]):
                if span >= mine:
                    continue
                for b, here in enumerate(own[i]):
                    there, _ = rows_here(tree, b, span)
                    for s, (first, last) in enumerate(here.rows[:-1]):
                        adds[i, other, j, s, b] = first < last and there[s][1] == first
    return adds


def _tokens_by_level(tree: GistTree, own: list[list[SampleRows]], starts: tuple[int, ...], sample: int) -> Tensor:
    """``tokens`` of one sample."""
    rows = tree.others.rows[sample]
    places = lambda i, segments: [rows[slice(*r)] - starts[i] for r in own[i][sample].rows[segments]]
    gists = [x for i in range(len(own)) for x in places(i, slice(None, -1))]
    return torch.cat([*gists, *(x for i in range(len(own)) for x in places(i, slice(-1, None)))])


def routing_loss_over_ranks(
    q: Tensor,
    k: Tensor,
    routed: Routed,
    division: Division,
    group: ProcessGroup,
    *,
    far: bool = False,
    scale: float | None = None,
) -> Tensor:
    """This rank's share of :func:`kernels.route.routing_loss`; the shares of all ranks add up to it. All ranks call it alike.

    Args:
        q: [m, H, D], this rank's sampled queries: ``mine`` of its :class:`RankPlan`. Never gets a gradient.
        k: [B, T / n, Hkv, D], the keys of this rank's part. Its gists get the gradient of the whole loss, all ranks' shares,
            times what backward hands to this rank's share: the same everywhere, if the shares are added up.
        routed: of the whole samples, alike on all ranks.
        division: of the samples over the ranks.
        group: the context-parallel group.
        far, scale: as there.

    Returns:
        A scalar, fp32 or wider.

    Raises:
        ValueError: a shape or dtype that does not fit, naming the argument.
    """
    _check_keys(k, routed, division)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    plan = rank_plan(routed, q.shape[1] // k.shape[2], division, group.rank(), q.device)
    _check_queries(q, k, plan)
    wanted = wants_gradient(k)
    with torch.no_grad():
        share, d_gists = _Share(_gather_queries(q, plan, group), k, routed, plan, group, far, scale).compute(wanted)
    return with_gradient(k, share, d_gists, plan.tokens[:, : d_gists.shape[1]])


def _check_keys(k: Tensor, routed: Routed, division: Division) -> None:
    others = routed.tree.others
    if others.tokens != division.tokens:
        raise ValueError(f"routed: {others.tokens} tokens per sample, but {division.tokens} were divided over the ranks")
    shape = (others.batch, division.held)
    if k.dim() != 4 or k.shape[:2] != shape:
        raise ValueError(f"k: shape {tuple(k.shape)}, expected [{shape[0]}, {shape[1]}, Hkv, D], the keys of this rank's part")


def _check_queries(q: Tensor, k: Tensor, plan: RankPlan) -> None:
    count = len(plan.mine)
    if q.dim() != 3 or q.shape[0] != count or q.shape[2] != k.shape[3] or q.shape[1] % k.shape[2]:
        raise ValueError(
            f"q: shape {tuple(q.shape)}, expected [{count}, H, {k.shape[3]}], this rank's sampled queries, "
            f"H a multiple of k's {k.shape[2]} heads"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"q: {q.dtype}, but k is {k.dtype}; make them equal")


def _gather_queries(q: Tensor, plan: RankPlan, group: ProcessGroup) -> Tensor:
    """All ranks' queries [M, H, D] from this rank's [m, H, D]."""
    padded = q.new_zeros(plan.most, *q.shape[1:])
    padded[: len(q)] = q.detach()
    everyone = q.new_empty(group.size() * plan.most, *q.shape[1:])
    dist.all_gather_into_tensor(everyone, padded, group=group)
    return everyone.index_select(0, plan.order)


@dataclass(frozen=True)
class _Piece:
    """A block of queries of one KV head against what is here of their sample.

    Attributes:
        number, rows, block, head: which; number: of the rank's slices.
        columns: [columns, D], the queries times the scale.
        keys: per gist segment [gists, D].
        hidden: what the columns do not have.
        mass: [level-0 slots of the span, columns], then per gist segment: first relative to this rank's largest score.
    """

    number: int
    rows: SampleRows
    block: RoutedBlock
    head: int
    columns: Tensor
    keys: list[Tensor]
    hidden: Hidden
    mass: list[Tensor]

    def gists(self) -> Iterator[tuple[int, int, int]]:
        """Per gist segment: its number, and the gists ``[first, last)`` of the span that are here, the open slot left out."""
        for s, (first, last) in enumerate(self.block.spans):
            begin, end = self.rows.rows[s]
            yield s, first, max(first, min(last, end - begin))


class _Share:
    """One call of one rank. Between its stages stand the collectives, whose numbers are [.., M, H].

    q: [M, H, D], all queries; k: [B, T / n, Hkv, D], this rank's.
    """

    def __init__(self, q: Tensor, k: Tensor, routed: Routed, plan: RankPlan, group: ProcessGroup, far: bool, scale: float):
        self.q, self.k, self.routed, self.plan, self.group = q, k.detach(), routed, plan, group
        self.far, self.scale, self.levels = far, scale, routed.tree.levels
        self.per_head = q.shape[1] // k.shape[2]
        self.wide = torch.promote_types(q.dtype, torch.float32)

    def compute(self, wanted: bool) -> tuple[Tensor, Tensor]:
        """The share, a scalar, and, if wanted, the gradient of its gists as the plan's tokens have them, [B, gists, Hkv, D]."""
        share = torch.zeros((), dtype=self.wide, device=self.q.device)
        gists = [[sum(last - first for first, last in rows.rows[:-1]) for rows in own] for own in self.plan.rows]
        batch, _, kv_heads, dim = self.k.shape
        most = max(sum(counts) for counts in zip(*gists))
        d_gists = torch.zeros(batch, kv_heads, most, dim, dtype=self.wide, device=self.q.device)
        if len(self.q):  # else nobody of the group has anything to exchange
            pieces = self._teach()
            log_sum, whole = self._close(pieces)
            for piece in pieces:
                begin = sum(counts[piece.rows.sample] for counts in gists[: piece.number])
                share += self._learn(piece, log_sum, whole, begin, d_gists if wanted else None)
        return share, d_gists.transpose(1, 2)

    def _numbers(self, *shape: int, fill: float = 0.0) -> Tensor:
        return torch.full((*shape, *self.q.shape[:2]), fill, dtype=self.wide, device=self.q.device)

    def _put(self, numbers: Tensor, piece: _Piece, values: Tensor) -> None:
        """values [columns] to where the piece's queries and heads stand in numbers [M, H]."""
        heads = slice(piece.head * self.per_head, (piece.head + 1) * self.per_head)
        numbers[piece.block.queries, heads] = values.view(-1, self.per_head)

    def _get(self, numbers: Tensor, piece: _Piece) -> Tensor:
        """The [columns] of a piece from numbers [M, H]."""
        return numbers[piece.block.queries, piece.head * self.per_head : (piece.head + 1) * self.per_head].flatten()

    def _teach(self) -> list[_Piece]:
        """All pieces, with the teacher's masses of what is here: shares of all ranks' raw tokens."""
        slices = len(self.plan.rows)
        top, total = self._numbers(slices, fill=-math.inf), self._numbers(slices)
        pieces = []
        for i, own in enumerate(self.plan.rows):
            for rows in own:
                keys = segment_keys(self.k, rows, self.routed, self.plan.starts[i])
                for block in rows.blocks:
                    hidden = Hidden.of(block, self.per_head, self.far)
                    for h in range(self.k.shape[2]):
                        columns = columns_of(self.q, block, h, self.k.shape[2], self.scale)
                        here = [x[h] for x in keys]
                        largest, summed, chunks = teacher(columns, here[-1], block, hidden)
                        # Of the raw rows nothing is needed any more.
                        piece = _Piece(i, rows, block, h, columns, here[:-1], replace(hidden, raw=[]), [chunks])
                        self._put(top[i], piece, largest)
                        self._put(total[i], piece, summed)
                        pieces.append(piece)
        highest = top.amax(0)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        factor = (top - highest).exp_()  # [own slices, M, H]
        whole = (total * factor).sum(0)
        dist.all_reduce(whole, group=self.group)
        factor /= whole
        for piece in pieces:
            chunks = piece.mass.pop().mul_(self._get(factor[piece.number], piece))
            piece.mass.extend(masses(chunks, piece.block, piece.hidden))
        return pieces

    def _close(self, pieces: list[_Piece]) -> tuple[Tensor, Tensor]:
        """Complete the masses of groups that begin on earlier ranks; the log-sum-exp of all gists' scores, and all masses' sum.

        Both [L, M, H].
        """
        slices, most = self.plan.adds.shape[0], self.plan.adds.shape[2]
        still_open, top = self._numbers(most, self.levels), self._numbers(slices, self.levels)
        sums = self._numbers(2, slices, self.levels)
        for piece in pieces:
            i = piece.number
            for s, first, last in piece.gists():
                _, largest, summed = student_scores(
                    piece.columns, piece.keys[s][first:last], piece.hidden.gists[s][: last - first]
                )
                self._put(top[i, s], piece, largest)
                self._put(sums[0, i, s], piece, summed)
                self._put(sums[1, i, s], piece, piece.mass[s].sum(0))
                if last < piece.block.spans[s][1]:
                    self._put(still_open[i, s], piece, piece.mass[s][last - first])
        everyone = self._numbers(self.group.size(), most, self.levels)
        dist.all_gather_into_tensor(everyone.flatten(0, 1), still_open, group=self.group)
        closed = (everyone * self.plan.adds[..., None]).sum((1, 2))  # [own slices, L, M, H]
        for piece in pieces:
            for s, first, last in piece.gists():
                if first == 0 < last:
                    piece.mass[s][0] += self._get(closed[piece.number, s], piece)
        highest = top.amax(0)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        sums[0] *= (top - highest).exp_()
        sums = sums.sum(1)
        dist.all_reduce(sums, group=self.group)
        # Where no rank has a gist the sum is 0; no mass is there either, so any finite number will do.
        return highest + sums[0].log().clamp_(min=0), sums[1]

    def _learn(self, piece: _Piece, log_sum: Tensor, whole: Tensor, begin: int, d_gists: Tensor | None) -> Tensor:
        """The loss of a piece's own gists, a scalar; adds to their gradient [B, Hkv, gists, D], where they begin at ``begin``."""
        loss = torch.zeros((), dtype=self.wide, device=self.q.device)
        for s, first, last in piece.gists():
            if last > first:
                hidden, keys = piece.hidden.gists[s][: last - first], piece.keys[s][first:last]
                scores, _, _ = student_scores(piece.columns, keys, hidden)
                shares = [self._get(x[s], piece) for x in (log_sum, whole)]
                part, d_scores = student_loss(scores, piece.mass[s][: last - first], *shares)
                loss += part
                if d_gists is not None:
                    at = slice(begin + first, begin + last)
                    d_gists[piece.rows.sample, piece.head, at].addmm_(d_scores, piece.columns)
            begin += piece.rows.rows[s][1] - piece.rows.rows[s][0]
        return loss
