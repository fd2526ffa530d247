"""The decoder as a list of layer specifications for DeepSpeed's PipelineModule.

Between stages travel the residual stream and a few integers per token: its level, its document, whether it recalls and, where
contexts may be linked, its role and part. From these every stage rebuilds the layout once per micro-batch; so nothing that grows
faster than the sequence is sent.
Labels are read by the last stage itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.gist import Recall, build_layout
from unfold.model.layers import BuildContext, RMSNorm, Rotary
from unfold.model.loss import token_loss_sum
from unfold.model.rows import matrix_with_rows
from unfold.model.transformer import Embedding, Layer, build_head
from unfold.model.visibility import AddedLosses, Attend, MicroBatch, attention_for

TIED = "embedding"  # key of the weight that the first and the last stage share


class StageAttention:
    """What the layers of one stage share: rotary factors and who sees whom, remade for each micro-batch.

    Attributes:
        gist: how tokens recall in the step at hand.
        route_scale: what the routing losses of the step at hand weigh (see :class:`unfold.model.gist.recall.Routing`).
        added: what the step at hand learns beside the next token (of an :class:`AddedLosses` its ``z`` alone).
        recalls: of the micro-batches since they were last taken: what the stage's layers read, and their routing losses.
    """

    def __init__(self, config: ModelConfig, gist: GistConfig | None, build: BuildContext):
        self._config, self._build = config, build
        self.gist, self.route_scale = gist, 0.0
        self.added: AddedLosses | None = None
        self.recalls: list[Recall] = []
        self._made: tuple[Tensor, Rotary, Attend] | None = None

    def for_micro_batch(self, structure: Tensor) -> tuple[Rotary, Attend]:
        """structure: [3 or 5, B, T] int32, level, document and flags of recall, role and part (see :func:`stage_inputs`)."""
        # A stage's layers take a micro-batch one after another; what is kept stays alive, so the same memory is the same one.
        if self._made is None or self._made[0].data_ptr() != structure.data_ptr():
            self._made = structure, *self._make(structure)
        return self._made[1:]

    def take_recalls(self) -> list[Recall]:
        """Those of the micro-batches so far; it begins again without any."""
        taken, self.recalls = self.recalls, []
        self._made = None
        return taken

    def _make(self, structure: Tensor) -> tuple[Rotary, Attend]:
        level, doc, flags, *linked = structure
        layout = build_layout(level, doc, self.gist, *linked)
        recall = Recall.from_flags(layout, self.gist, flags, self.route_scale) if flags.any() else None
        if recall is not None:
            self.recalls.append(recall)
        context = self._build.context
        position = context.part(layout.position, 1) if context else layout.position
        return Rotary.of(position, self._config), attention_for(self._config.attention, layout, recall, context)


class EmbeddingStage(Embedding):
    """First layer: (ids [B, T], structure) -> (x [T, B, hidden], structure)."""

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ids, structure = inputs
        context = self.build.context
        return super().forward(context.part(ids, 1) if context else ids), structure


class LayerStage(Layer):
    """(x, structure) -> (x, structure)"""

    def __init__(self, config: ModelConfig, build: BuildContext, index: int, shared: StageAttention):
        super().__init__(config, build, index)
        self._shared = shared

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, structure = inputs
        return super().forward(x, *self._shared.for_micro_batch(structure)), structure


class FinalNormStage(RMSNorm):
    """(x, structure) -> x after the final norm."""

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(inputs[0])


class HeadStage(nn.Module):
    """x -> (x, this rank's rows of the untied head), for the loss."""

    def __init__(self, config: ModelConfig, build: BuildContext):
        super().__init__()
        self.head, self._group = build_head(config, build), build.tp_group

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, matrix_with_rows(self.head, self._group)


def _tied_head(embedding: EmbeddingStage, x: Tensor) -> tuple[Tensor, Tensor]:
    return x, matrix_with_rows(embedding, embedding.build.tp_group)


def layer_specs(
    config: ModelConfig, build: BuildContext, shared: StageAttention, tied_attributes: Sequence[str] = ("weight",)
) -> list[LayerSpec]:
    """The model's layers, to be spread over stages by the type :class:`LayerStage`.

    tied_attributes: the parameters of a tied embedding that are trained; those of its two stages get the sum of their gradients.
    """
    layers = [LayerSpec(LayerStage, config, build, i, shared) for i in range(config.layers)]
    norm = LayerSpec(FinalNormStage, config.hidden_size, config.norm_eps, build)
    if not config.tied_embeddings:
        return [LayerSpec(EmbeddingStage, config, build), *layers, norm, LayerSpec(HeadStage, config, build)]
    tied = partial(TiedLayerSpec, TIED, EmbeddingStage, config, build, tied_weight_attr=list(tied_attributes))
    return [tied(), *layers, norm, tied(forward_fn=_tied_head)]


def stage_loss(
    build: BuildContext, shared: StageAttention, outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]
) -> Tensor:
    """outputs: (hidden, head weight) of the last stage; targets: (labels [B, T], factor). The scaled sum of token losses."""
    hidden, weight = outputs
    labels, factor = targets
    if build.context:
        labels = build.context.part(labels, 1)
    return token_loss_sum(hidden, labels, weight, build, shared.added) * factor


def stage_inputs(batch: MicroBatch, factor: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A micro-batch as DeepSpeed's pipeline takes it: ((ids, structure), (labels, factor of the loss))."""
    layout = batch.layout
    level, doc = layout.level.to(torch.int32), layout.doc.to(torch.int32)
    flags = batch.recall.flags if batch.recall else torch.zeros_like(level)
    linked = [] if layout.role is None else [layout.role.to(torch.int32), layout.part.to(torch.int32)]
    return (batch.ids, torch.stack([level, doc, flags, *linked])), (batch.labels, torch.tensor(factor))


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
