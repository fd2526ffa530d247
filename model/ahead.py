"""Plans made ahead: what a rank's layers and its loss will ask of a micro-batch, made by whoever loads it.

Plans are tables of the kernels, who sends what to whom, which tokens have a target: all that follows from the layout alone. They
are kept where layers look for them, on the host; a micro-batch that is copied to a GPU copies each as it is asked for. Which they
are, the attention of every layer says itself, by the branches that it takes in a step, so nothing is made that none will ask for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unfold.model.config import ModelConfig
from unfold.model.distill import TeacherAttention
from unfold.model.loss import Targets
from unfold.model.parallel.context import ContextParallel
from unfold.model.transformer import Layer
from unfold.model.visibility import MicroBatch, attention_for


@dataclass(frozen=True)
class Ahead:
    """What one rank of a run asks of every micro-batch of a training step.

    Attributes:
        config: of the model.
        layers: the numbers of those that the rank has.
        q, k: [0, 0, H, D] and [0, 0, Hkv, D], with heads, dtype and device of what the rank's layers attend with.
        context: how sequences are spread over ranks; None where every rank has whole ones.
        predicts: whether the rank has the loss.
        from_logits: whether next-token distributions of distilled samples are learned from.
    """

    config: ModelConfig
    layers: tuple[int, ...]
    q: Tensor
    k: Tensor
    context: ContextParallel | None = None
    predicts: bool = True
    from_logits: bool = False

    @classmethod
    def of(cls, module: nn.Module, config: ModelConfig, device: torch.device, tensor_ranks: int = 1, **others) -> Ahead:
        """For the layers of a model or of a pipeline's stage, each of which ``tensor_ranks`` ranks share; others: attributes."""
        layers = [part for part in module.modules() if isinstance(part, Layer)]
        dtype = layers[0].attention_norm.weight.dtype if layers else torch.float32
        heads = (config.heads // tensor_ranks, config.kv_heads // tensor_ranks)
        q, k = (torch.empty(0, 0, n, config.head_dim, dtype=dtype, device=device) for n in heads)
        return cls(config, tuple(layer.attention.index for layer in layers), q, k, **others)

    def prepare(self, batch: MicroBatch) -> None:
        """Make the plans of a micro-batch that lies on the host: each once, and none that is there."""
        part = None if self.context is None else self.context.of(batch.layout)
        attend = attention_for(self.config.kinds, batch.layout, batch.recall, part)
        for index in self.layers:
            attend.prepare(index, self.q, self.k)
        if batch.distilled:
            teacher = TeacherAttention(batch.layout, batch.distilled, self.config.kinds, part)
            for index in self.layers:
                teacher.prepare(index, self.q, self.k)
        if self.predicts:
            Targets.of_batch(batch, part, batch.distilled if self.from_logits else ())
