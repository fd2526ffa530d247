"""Learning from dense attention: what the same weights make of the same rows where raw tokens see all raw tokens before them.

Layers with a window keep it: they have nothing else to show.

The teacher is no second model and has no layout of its own: its rows are the student's, gists included (nobody sees them
there), so it runs wherever the student does, layer by layer beside it. Raw tokens get what a dense model would give them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.model.config import ModelConfig
from unfold.model.gist import Layout
from unfold.model.gist.layout import raw_layout
from unfold.model.kinds import Kinds, dense_kinds, kind_of, window_of
from unfold.model.layers import BuildContext, Rotary
from unfold.model.parallel.context import ContextAttention, ContextPart
from unfold.model.parallel.tensor import sum_over_group
from unfold.model.visibility import Attend, MicroBatch, MicroBatchAttention, attention_for


@dataclass(frozen=True)
class TeacherAttention:
    """The teacher's attention; an :data:`Attend`.

    Attributes:
        layout: of the whole micro-batch.
        samples: those of it that learn from the teacher.
        kinds: of the model's layers.
        part: what this rank holds, None for all.
    """

    layout: Layout
    samples: tuple[int, ...]
    kinds: Kinds
    part: ContextPart | None

    def taught(self, index: int) -> tuple[Tensor | None, Layout]:
        """Which samples are wanted, None for all, whose hidden states then need no copy; and their layout in one layer."""
        kind = kind_of(dense_kinds(self.kinds), index)
        make = lambda whole: _taught(whole, self.samples, window_of(kind))
        return self.layout.planned(("taught", self.samples, kind), make)

    def prepare(self, index: int, q: Tensor, k: Tensor) -> None:
        """As :meth:`unfold.model.visibility.MicroBatchAttention.prepare`; it has no gradients."""
        self._in_layer(index).prepare(index, q, k, backward=False)

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._in_layer(index)(index, q, k, v)

    def _in_layer(self, index: int) -> MicroBatchAttention | ContextAttention:
        return attention_for("gist", self.taught(index)[1], None, self.part)


class DenseTeacher:
    """Dense attention in one micro-batch, for the samples that learn from it.

    Attributes:
        state: [T, samples, hidden], the residual stream behind the layers so far; this rank's part of T.
    """

    def __init__(self, batch: MicroBatch, config: ModelConfig, build: BuildContext):
        self._build, self._added = build, batch.added
        self._attend = TeacherAttention(batch.layout, batch.added.samples, config.kinds, build.part_of(batch.layout))
        self._chosen, layout = self._attend.taught(0)
        part = lambda x: build.own_part(x, batch.layout)
        self._config, self._position = config, part(layout.position)
        raw = part((layout.level < 0) & (layout.doc >= 0)).t()
        if build.sequence_split:
            raw = raw.chunk(build.tp_group.size())[build.tp_group.rank()]
        self._raw = raw[..., None]  # [T, samples, 1]
        self._distance: Tensor | None = None

    def begin(self, x: Tensor) -> None:
        """x: [T, B, hidden], the student's embeddings."""
        self.state = self._of_samples(x.detach())
        self._rotary = Rotary.of(self._position, self._config, x.dtype)

    @torch.no_grad()
    def through(self, module: Callable[..., Tensor], *attention: Rotary | Attend) -> None:
        self.state = module(self.state, *attention)

    def follow(self, layer: Callable[..., Tensor], x: Tensor) -> None:
        """Take the layer whose output is the student's x, [T, B, hidden], and compare."""
        self.through(layer, self._rotary, self._attend)
        if self._added.hidden:
            distance = _Distance.apply(self._of_samples(x), self.state, self._raw)
            self._distance = distance if self._distance is None else self._distance + distance

    def added_to(self, loss: Tensor) -> Tensor:
        """The value of a loss, with the gradient of the layers' distances beside its own."""
        if self._distance is None:
            return loss
        split = self._build.sequence_split  # each tensor-parallel rank then compared its part
        whole = sum_over_group(self._distance.detach().clone(), self._build.tp_group) if split else self._distance
        self._added.note("hidden", whole)
        weighted = self._added.hidden * self._distance
        return loss + (weighted - weighted.detach())

    def _of_samples(self, x: Tensor) -> Tensor:
        return x if self._chosen is None else x.index_select(1, self._chosen)


def _taught(layout: Layout, samples: tuple[int, ...], window: int | None) -> tuple[Tensor | None, Layout]:
    """As :meth:`TeacherAttention.taught`."""
    chosen = None if len(samples) == len(layout.doc) else torch.tensor(samples, device=layout.device)
    return chosen, raw_layout(layout, window, chosen, gists=False)


class _Distance(torch.autograd.Function):
    """Smooth-L1 (with its bend at 1) of states and their teacher's, summed over the elements of raw tokens."""

    @staticmethod
    def forward(ctx, x: Tensor, teacher: Tensor, raw: Tensor) -> Tensor:
        """x, teacher: [T, samples, hidden]; raw: bool [T, samples, 1] -> scalar, fp32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        difference = (x.to(wide) - teacher.to(wide)).mul_(raw)
        slope = difference.clamp(-1, 1)
        ctx.save_for_backward(slope.to(x.dtype))
        return difference.sub_(slope, alpha=0.5).mul_(slope).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(slope.dtype), None, None
