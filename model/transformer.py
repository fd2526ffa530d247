"""The decoder: embedding, layers and output head, on megatron-core's tensor-parallel parts.

The residual stream is [T, B, hidden] (sequence first, as megatron's parallel layers expect); attention works on
[B, T, H, D]. Module names are the canonical parameter names of checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unfold.model.attention import Attention
from unfold.model.config import ModelConfig
from unfold.model.distill import DenseTeacher
from unfold.model.gist import Layout, Recall
from unfold.model.layers import MLP, BuildContext, RMSNorm, Rotary
from unfold.model.lora import add_adapters
from unfold.model.loss import Targets, token_loss_sum
from unfold.model.parallel.tensor import ColumnLinear, VocabularyEmbedding, column_product, gather_outputs, gather_sequence
from unfold.model.recompute import Again, computed_again
from unfold.model.rows import add_rows, matrix_with_rows, with_own_rows
from unfold.model.visibility import Attend, MicroBatch, attention_for


class Embedding(VocabularyEmbedding):
    """The token embedding of a model."""

    def __init__(self, config: ModelConfig, build: BuildContext):
        super().__init__(
            config.padded_vocab_size,
            config.hidden_size,
            init_method=build.normal("embedding.weight", config.init_std),
            config=build.megatron(),
            tp_group=build.tp_group,
            sequence_split=build.sequence_split,
        )
        self.build = build
        if build.rows:
            shape = config.padded_vocab_size, config.hidden_size
            add_rows(self, build.rows, shape, build.normal("embedding.weight", config.init_std), build.tp_group)

    def replaced(self, x: Tensor, ids: Tensor) -> Tensor:
        """Embedded tokens [T, B, hidden], those whose rows are a parameter of their own taken from it."""
        return with_own_rows(x, ids, self.rows, self.row_ids) if self.build.rows else x


def build_head(config: ModelConfig, build: BuildContext) -> ColumnLinear:
    """The output head of a model whose embedding is not tied to it."""
    head = build.column("head", config.hidden_size, config.padded_vocab_size, config.init_std)
    if build.rows:
        shape = config.padded_vocab_size, config.hidden_size
        add_rows(head, build.rows, shape, build.normal("head.weight", config.init_std), build.tp_group)
    return head


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, build: BuildContext, index: int):
        super().__init__()
        name = f"layers.{index}"
        residual_std = config.init_std / math.sqrt(2 * config.layers)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, build)
        self.attention = Attention(config, build, index, residual_std)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, build)
        self.mlp = MLP(config, build, f"{name}.mlp", residual_std)
        self.recompute = build.recompute
        if build.lora:
            add_adapters(self, name, config, build.lora, build.normal, build.tp_group)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """[T, B, hidden] -> [T, B, hidden]"""
        recompute = self.recompute
        if recompute.checkpointing == "none" or not (self.training and torch.is_grad_enabled()):
            return self._whole(x, rotary, attend)
        with recompute.keeping(attend):
            if recompute.checkpointing == "full":
                return computed_again(self._whole, x, rotary, attend)
            q, k, v = computed_again(self._before_attention, x, rotary)
            return computed_again(self._after_attention, x, attend(self.attention.index, q, k, v))

    def _whole(self, x: Tensor, rotary: Rotary, attend: Attend, again: Again | None = None) -> Tensor:
        x, normed = self.mlp_norm(x, self.attention(self.attention_norm(x), rotary, attend))
        return x + self.mlp(normed, again)

    def _before_attention(self, x: Tensor, rotary: Rotary, again: Again) -> tuple[Tensor, ...]:
        # Contiguous, since a view would keep the whole fused projection.
        return tuple(part.contiguous() for part in self.attention.heads(self.attention_norm(x), rotary))

    def _after_attention(self, x: Tensor, out: Tensor, again: Again) -> Tensor:
        x, normed = self.mlp_norm(x, self.attention.project(out))
        return x + self.mlp(normed, again)


def build_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A whole model on this process, without torch.distributed. Its initial weights are a pure function of the seed."""
    return Transformer(config, BuildContext.alone(seed))


class Transformer(nn.Module):
    """The whole model on one pipeline stage.

    Attributes:
        config: of the model; another one may take its place between micro-batches, for other rotary positions.
    """

    def __init__(self, config: ModelConfig, build: BuildContext):
        """Args:
        config: the model's shape; vocab_size must be set.
        build: tensor-parallel group, seed of the initial weights, what layers compute again in backward.
        """
        super().__init__()
        self.config, self.build = config, build
        self.embedding = Embedding(config, build)
        self.layers = nn.ModuleList(Layer(config, build, i) for i in range(config.layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, build)
        if not config.tied_embeddings:
            self.head = build_head(config, build)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, [vocab / tp, hidden]."""
        return matrix_with_rows(self.embedding if self.config.tied_embeddings else self.head, self.build.tp_group)

    def final_states(
        self, ids: Tensor, layout: Layout, recall: Recall | None = None, teacher: DenseTeacher | None = None
    ) -> Tensor:
        """[B, T] -> [T, B, hidden] after the final norm; under context parallelism this rank's part of T."""
        attend = attention_for(self.config.kinds, layout, recall, self.build.part_of(layout))
        ids, position = (self.build.own_part(x, layout) for x in (ids, layout.position))
        return self.run_layers(ids, position, attend, teacher)

    def run_layers(self, ids: Tensor, position: Tensor, attend: Attend, teacher: DenseTeacher | None = None) -> Tensor:
        """ids, rotary positions [B, T] int64 -> [T, B, hidden] after the final norm.

        attend: who sees whom; teacher: passes through the layers too, for what is learned from it.
        """
        x = self.embedding(ids)
        if teacher:
            teacher.begin(x)
        rotary = Rotary.of(position, self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, attend)
            if teacher:
                teacher.follow(layer, x)
        if teacher:
            teacher.through(self.final_norm)
        return self.final_norm(x)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Sum of the token losses of a micro-batch, fp32 scalar; under context parallelism of this rank's part.

        What ``batch.added`` asks for is in its gradient, not in its value.
        """
        added = batch.added
        teacher = DenseTeacher(batch, self.config, self.build) if added and added.samples else None
        hidden = self.final_states(batch.ids, batch.layout, batch.recall, teacher)
        samples = added.samples if added and added.logits else ()
        targets = Targets.of_batch(batch, self.build.part_of(batch.layout), samples)
        loss = token_loss_sum(hidden, targets, self.head_weight, self.build, added, teacher and teacher.state)
        return teacher.added_to(loss) if teacher else loss

    @torch.no_grad()
    def logits(self, ids: Tensor, layout: Layout, recall: Recall | None = None) -> Tensor:
        """[B, T] -> logits over the unpadded vocabulary, [B, T, vocab_size]."""
        return self.head_logits(self.final_states(ids, layout, recall)).transpose(0, 1)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """[T, .., hidden] after the final norm -> logits over the unpadded vocabulary, [T, .., vocab_size]."""
        build = self.build
        if build.sequence_split:
            hidden = gather_sequence(hidden, build.tp_group)
        parts = column_product(hidden, self.head_weight, build.tp_group, input_is_gathered=build.sequence_split)
        return gather_outputs(parts, build.tp_group)[..., : self.config.vocab_size]
