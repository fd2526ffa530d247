"""The loss of hidden states, without logits: rows pass the output head in chunks, over a split vocabulary or a whole one.

Nothing of the size of the logits outlives its chunk, and nothing is computed twice: the gradients of hidden states and of the
head's weight are made in the forward pass, and backward multiplies them with what it is given. DeepSpeed's
TiledFusedLogitsLoss works alike on one process, but adds the head's gradient to its weight at once, whatever the loss is
multiplied with afterwards; PyTorch's linear_cross_entropy knows no split vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from unfold.model.layers import BuildContext
from unfold.model.parallel.context import ContextPart
from unfold.model.parallel.tensor import Group, copy_to_group, gather_sequence, reduce_in_place
from unfold.model.visibility import IGNORED, AddedLosses, MicroBatch

CHUNK = 1024  # rows whose logits are there at a time


@dataclass(frozen=True)
class Targets:
    """Which hidden states reach the head, in this order, and what they are to predict. N places with a target.

    Attributes:
        places: int64 [N], of [T * B]; those of the samples that have a teacher come first.
        ids: int64 [N].
        taught: int64 [M], where those first ones stand in [T * samples].
    """

    places: Tensor
    ids: Tensor
    taught: Tensor

    @classmethod
    def of_batch(cls, batch: MicroBatch, part: ContextPart | None, samples: tuple[int, ...] = ()) -> Targets:
        """The (memoised) targets of a micro-batch, of which a rank holds ``part``, None for all; samples: as of :meth:`of`."""
        mine = lambda whole: whole.labels if part is None else part.take(whole.labels, 1)
        return batch.planned(("targets", samples), lambda whole: cls.of(mine(whole), samples))

    @classmethod
    def of(cls, labels: Tensor, samples: tuple[int, ...] = ()) -> Targets:
        """labels: [B, T], from which sizes are read; samples: those that have a teacher."""
        labels = labels.t()  # [T, B]
        has = labels != IGNORED
        first = torch.zeros_like(has)
        first[:, samples] = has[:, samples]
        places = torch.cat([x.flatten().nonzero()[:, 0] for x in (first, has & ~first)])
        ids = labels.flatten().index_select(0, places)
        return cls(places, ids, has[:, samples].flatten().nonzero()[:, 0])


def token_loss_sum(
    hidden: Tensor,
    targets: Targets,
    weight: Tensor,
    build: BuildContext,
    added: AddedLosses | None = None,
    teacher: Tensor | None = None,
) -> Tensor:
    """Sum of the next-token cross-entropies, fp32 scalar; its gradient is that of all losses together.

    Positions without a target never reach the output head.

    Args:
        hidden: [T, B, hidden] after the final norm (T / n under sequence parallelism).
        targets: of the same T and B.
        weight: this rank's rows of the head, [vocab / n, hidden].
        added: what else is learned from logits; its sums are filled in.
        teacher: [T, samples, hidden], what ``hidden`` of ``added.samples`` is under dense attention; needed if ``added.logits``.
    """
    added = added or AddedLosses()
    if build.sequence_split:
        hidden = gather_sequence(hidden, build.tp_group)
    taught = None
    if added.logits:
        if build.sequence_split:
            teacher = gather_sequence(teacher, build.tp_group)
        taught = teacher.flatten(0, 1).index_select(0, targets.taught)
    rows = hidden.flatten(0, 1).index_select(0, targets.places)
    if not build.sequence_split:  # else the gathering's backward sums the gradients over the ranks
        rows = copy_to_group(rows, build.tp_group)
    wants_gradient = torch.is_grad_enabled()
    wants = wants_gradient and rows.requires_grad, wants_gradient and weight.requires_grad
    weights, each = (added.z, added.logits), rows.new_empty(len(rows), dtype=torch.float32) if added.apart else None
    loss, squared, divergence = _Losses.apply(rows, weight, targets.ids, taught, weights, build.tp_group, wants, each)
    if added.z:
        added.note("z", squared)
    if added.logits:
        added.note("logits", divergence)
    if added.apart:
        _note_apart(added, each, targets.places % hidden.shape[1])
    return loss


def _note_apart(added: AddedLosses, each: Tensor, sample: Tensor) -> None:
    """Sum token losses, [N], by what their samples are called. sample: int64 [N]."""
    zeros = torch.zeros(2, len(added.apart), dtype=torch.float64, device=each.device)
    sums = zeros.index_add_(1, sample, torch.stack([each.double(), torch.ones_like(each, dtype=torch.float64)]))
    for (loss, tokens), name in zip(sums.unbind(1), added.apart):
        added.note(f"loss.{name}", loss)
        added.note(f"tokens.{name}", tokens)


class _Losses(torch.autograd.Function):
    """Cross-entropy, squared log-partition and divergence from a teacher, each a sum over rows; gradients are made forward."""

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        taught: Tensor | None,
        weights: tuple[float, float],
        group: Group,
        wants: tuple[bool, bool],
        each: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """rows [N, hidden]; weight [vocab / n, hidden]; targets [N]; taught [M, hidden], the teacher's first M rows, or None.

        weights: what squared log-partition and divergence weigh against a row's cross-entropy in the first result's gradient.
        wants: whether gradients of rows and weight are asked for; each is a product of the size of the logits' own.
        each: fp32 [N] to write every row's cross-entropy into; None: nobody asks.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        sums = torch.zeros(3, dtype=wide, device=rows.device)
        of_rows, of_weight = wants
        d_rows = torch.empty_like(rows) if of_rows else None
        d_weight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        compared = 0 if taught is None else len(taught)
        for start, stop in _chunks(compared, len(rows)):
            part = rows[start:stop]
            logits = (part @ weight.t()).to(wide)
            others = (taught[start:stop] @ weight.t()).to(wide) if start < compared else None
            losses, d_logits, own = _chunk_losses(logits, others, targets[start:stop], weights, group, of_rows or of_weight)
            sums += losses
            if each is not None:
                each[start:stop] = own
            del logits, others  # they hold nothing more, and memory is what chunks are for
            if of_rows or of_weight:
                d_logits = d_logits.to(rows.dtype)
            if of_rows:
                torch.mm(d_logits, weight, out=d_rows[start:stop])
            if of_weight:
                _add_product(d_weight, d_logits.t(), part)
            del d_logits
        ctx.save_for_backward(d_rows, d_weight.to(weight.dtype) if of_weight else None)
        ctx.mark_non_differentiable(squared := sums[1].clone(), diverged := sums[2].clone())
        return sums[0].clone(), squared, diverged

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        d_rows, d_weight = (None if x is None else (grad * x).to(x.dtype) for x in ctx.saved_tensors)
        return d_rows, d_weight, *(None,) * 6


def _chunks(compared: int, rows: int) -> list[tuple[int, int]]:
    """[start, stop) of the chunks: of the first ``compared`` rows, then of the others."""
    parts = ((0, compared), (compared, rows))
    return [(at, min(at + CHUNK, stop)) for start, stop in parts for at in range(start, stop, CHUNK)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed over chunks in the total's precision."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total += a @ b


def _chunk_losses(
    logits: Tensor,
    others: Tensor | None,
    targets: Tensor,
    weights: tuple[float, float],
    group: Group,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The three sums of a chunk, the gradient of their weighted sum in place of its logits, and each row's cross-entropy.

    logits, others: this rank's part of the student's and of the teacher's, [n, vocab / ranks]; both are overwritten.
    """
    z, divergence = weights
    top = torch.stack([x.amax(-1) for x in (logits, others) if x is not None])
    reduce_in_place(top, dist.ReduceOp.MAX, group)
    logits -= top[0, :, None]
    own = targets - group.rank() * logits.shape[-1]
    elsewhere = (own < 0) | (own >= logits.shape[-1])
    own = own.masked_fill(elsewhere, 0)[:, None]
    partial = [logits.gather(1, own)[:, 0].masked_fill(elsewhere, 0)]
    if others is not None:
        others -= top[1, :, None]
        difference = others - logits
        difference *= others.exp_()
        partial += [others.sum(-1), difference.sum(-1)]
        del difference
    partial = torch.stack([logits.exp_().sum(-1), *partial])
    reduce_in_place(partial, dist.ReduceOp.SUM, group)
    total, at_target, *of_teacher = partial
    log_total = total.log()
    partition = log_total + top[0]
    own_losses = log_total - at_target
    losses = [own_losses.sum(), partition.square().sum(), torch.zeros_like(total[0])]
    if others is not None:
        teacher_total, weighted = of_teacher
        losses[2] = (weighted / teacher_total - teacher_total.log() + log_total).sum()
    if not wants_gradient:
        return torch.stack(losses), None, own_losses
    factor = 1 + 2 * z * partition + (divergence if others is not None else 0.0)
    logits *= (factor / total)[:, None]
    logits.scatter_add_(1, own, (elsewhere.to(logits.dtype) - 1)[:, None])
    if others is not None:
        logits -= others.mul_((divergence / teacher_total)[:, None])
    return torch.stack(losses), logits, own_losses
