"""The decoder as a list of layer specifications for DeepSpeed's PipelineModule.

Between stages travels the residual stream alone: every stage reads and lays out the micro-batches itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from unfold.model.config import ModelConfig
from unfold.model.layers import BuildContext, RMSNorm, Rotary
from unfold.model.loss import Targets, token_loss_sum
from unfold.model.parallel.context import ContextParallel
from unfold.model.rows import matrix_with_rows
from unfold.model.transformer import Embedding, Layer, build_head
from unfold.model.visibility import AddedLosses, Attend, MicroBatch, attention_for

TIED = "embedding"  # key of the weight that the first and the last stage share


class StageAttention:
    """What the layers of one stage share: the micro-batch that passes them, its rotary factors and who sees whom.

    Every stage has all micro-batches of a step, read from the shards and laid out on its own host, so between stages nothing
    but the residual stream is sent, and no size is read from a GPU.

    Attributes:
        config: of the model; another one may take its place between micro-batches, for other rotary positions.
    """

    def __init__(self, config: ModelConfig, build: BuildContext):
        self.config, self._build = config, build
        self._left: list[MicroBatch] = []
        self._layer = -1
        self._batch: MicroBatch | None = None
        self._done: Callable[[MicroBatch], None] | None = None

    @contextmanager
    def passing(
        self, batches: Sequence[MicroBatch], device: torch.device, done: Callable[[MicroBatch], None] | None = None
    ) -> Iterator[None]:
        """While the pipeline runs over these micro-batches. done: told of each that has passed the stage's layers."""
        self._left, self._device, self._done = list(reversed(batches)), device, done
        try:
            yield
            self._finish()
        finally:
            self._left, self._layer, self._batch, self._shared = [], -1, None, None

    def for_layer(self, index: int) -> tuple[Rotary, Attend]:
        """What a layer needs in the forward pass of the micro-batch that has come to it."""
        if index <= self._layer:  # a stage's layers take a micro-batch one after another: this is the next one
            self._finish()
        if self._batch is None:
            self._begin()
        self._layer = index
        return self._shared

    def targets(self) -> tuple[Targets, AddedLosses | None]:
        """What the micro-batch that has passed the layers is to predict, and what it learns beside."""
        return Targets.of_batch(self._batch, self._build.part_of(self._batch.layout)), self._batch.added

    def _begin(self) -> None:
        self._batch = batch = self._left.pop().to(self._device)
        layout = batch.layout
        attend = attention_for(self.config.kinds, layout, batch.recall, self._build.part_of(layout))
        self._shared = Rotary.of(self._build.own_part(layout.position, layout), self.config), attend

    def _finish(self) -> None:
        if self._batch is not None and self._done is not None:
            self._done(self._batch)
        self._batch, self._layer = None, -1


class LayerStage(Layer):
    """x -> x, for whatever micro-batch passes."""

    def __init__(self, config: ModelConfig, build: BuildContext, index: int, shared: StageAttention):
        super().__init__(config, build, index)
        self._shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, *self._shared.for_layer(self.attention.index))


class HeadStage(nn.Module):
    """x -> (x, this rank's rows of the untied head), for the loss."""

    def __init__(self, config: ModelConfig, build: BuildContext):
        super().__init__()
        self.head, self._group = build_head(config, build), build.tp_group

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, matrix_with_rows(self.head, self._group)


def _tied_head(embedding: Embedding, x: Tensor) -> tuple[Tensor, Tensor]:
    return x, matrix_with_rows(embedding, embedding.build.tp_group)


def layer_specs(
    config: ModelConfig, build: BuildContext, shared: StageAttention, tied_attributes: Sequence[str] = ("weight",)
) -> list[LayerSpec]:
    """The model's layers, to be spread over stages by the type :class:`LayerStage`.

    tied_attributes: the parameters of a tied embedding that are trained; those of its two stages get the sum of their gradients.
    """
    layers = [LayerSpec(LayerStage, config, build, i, shared) for i in range(config.layers)]
    norm = LayerSpec(RMSNorm, config.hidden_size, config.norm_eps, build)
    if not config.tied_embeddings:
        return [LayerSpec(Embedding, config, build), *layers, norm, LayerSpec(HeadStage, config, build)]
    tied = partial(TiedLayerSpec, TIED, Embedding, config, build, tied_weight_attr=list(tied_attributes))
    return [tied(), *layers, norm, tied(forward_fn=_tied_head)]


def stage_loss(build: BuildContext, shared: StageAttention, outputs: tuple[Tensor, Tensor], factor: Tensor) -> Tensor:
    """outputs: (hidden, head weight) of the last stage; factor: of the loss. The scaled sum of token losses."""
    hidden, weight = outputs
    targets, added = shared.targets()
    return token_loss_sum(hidden, targets, weight, build, added) * factor


def stage_inputs(batch: MicroBatch, factor: float, context: ContextParallel | None) -> tuple[Tensor, Tensor]:
    """A micro-batch as DeepSpeed's pipeline takes it: this rank's ids, factor of the loss."""
    ids = batch.ids if context is None else context.of(batch.layout).take(batch.ids, 1)
    return ids, torch.tensor(factor)


def canonical_name(layers: int) -> Callable[[str], str]:
    """Names of the pipeline's parameters -> those of :class:`unfold.model.transformer.Transformer`."""

    def rename(name: str) -> str:
        name = name.removeprefix(f"tied_modules.{TIED}.")
        match = re.match(r"(\d+)\.(.*)", name)
        if not match:
            return f"embedding.{name}"
        place, rest = int(match[1]), match[2]
        if place == 0:
            return f"embedding.{rest}"
        if place <= layers:
            return f"layers.{place - 1}.{rest}"
        return f"final_norm.{rest}" if place == layers + 1 else rest

    return rename
