"""The decoder: embedding, layers, output head and loss, on megatron-core's tensor-parallel parts.

The residual stream is [T, B, hidden] (sequence first, as megatron's parallel layers expect); attention works on
[B, T, H, D]. Module names are the canonical parameter names of checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_tensor_model_parallel_region,
    linear_with_grad_accumulation_and_async_allreduce,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention
from model.config import ModelConfig
from model.gist import Layout, Recall
from model.layers import MLP, BuildContext, RMSNorm, Rotary

IGNORED = -100  # label of a position that has no target


@dataclass(frozen=True)
class MicroBatch:
    """Packed interleaved samples, ready for the model.

    Attributes:
        ids: [B, T] int64 vocabulary ids; padding may hold any valid id.
        labels: [B, T] int64 next raw token at raw tokens, IGNORED elsewhere (gists, padding, a document's last token).
        layout: what follows from where the gists are.
        recall: which tokens unfold chunks, and how; None where none does.
    """

    ids: Tensor
    labels: Tensor
    layout: Layout
    recall: Recall | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device."""
        move = lambda x: x.to(device, non_blocking=True)
        recall = self.recall and self.recall.to(device)
        return MicroBatch(move(self.ids), move(self.labels), self.layout.to(device), recall)


class Embedding(VocabParallelEmbedding):
    """Token embedding with the vocabulary split over the tensor-parallel group."""

    def __init__(self, config: ModelConfig, build: BuildContext, name: str):
        super().__init__(
            config.padded_vocab_size,
            config.hidden_size,
            init_method=build.normal(f"{name}.weight", config.init_std),
            config=build.megatron(),
            tp_group=build.tp_group,
        )

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] int64 -> [T, B, hidden]"""
        return super().forward(ids).transpose(0, 1).contiguous()


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, build: BuildContext, index: int):
        super().__init__()
        name = f"layers.{index}"
        residual_std = config.init_std / math.sqrt(2 * config.layers)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, build, index, residual_std)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, build, f"{name}.mlp", residual_std)

    def forward(self, x: Tensor, layout: Layout, rotary: Rotary, recall: Recall | None) -> Tensor:
        """[T, B, hidden] -> [T, B, hidden]"""
        x = x + self.attention(self.attention_norm(x), layout, rotary, recall)
        return x + self.mlp(self.mlp_norm(x))


def vocab_logits(x: Tensor, weight: Tensor, build: BuildContext) -> Tensor:
    """[.., hidden] -> [.., vocab / tp]; ``weight`` is this rank's rows of the head or of the tied embedding."""
    reduce_input_gradient = build.tp_group.size() > 1
    return linear_with_grad_accumulation_and_async_allreduce(
        x, weight, None, False, reduce_input_gradient, False, tp_group=build.tp_group
    )


def token_loss_sum(hidden: Tensor, labels: Tensor, weight: Tensor, build: BuildContext) -> Tensor:
    """Sum of the next-token cross-entropies, fp32 scalar. Positions without a target never reach the output head.

    hidden: [T, B, hidden] after the final norm; labels: [B, T].
    """
    targets = labels.t().reshape(-1)
    has_target = targets != IGNORED
    logits = vocab_logits(hidden.flatten(0, 1)[has_target], weight, build)
    return vocab_parallel_cross_entropy(logits.float()[:, None], targets[has_target][:, None]).sum()


class Transformer(nn.Module):
    """The whole model on one pipeline stage."""

    def __init__(self, config: ModelConfig, build: BuildContext, activation_checkpointing: bool = False):
        """Args:
        config: the model's shape; vocab_size must be set.
        build: tensor-parallel group and seed of the initial weights.
        activation_checkpointing: recompute each layer in backward instead of keeping its activations.
        """
        super().__init__()
        self.config, self.build = config, build
        self.activation_checkpointing = activation_checkpointing
        self.embedding = Embedding(config, build, "embedding")
        self.layers = nn.ModuleList(Layer(config, build, i) for i in range(config.layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied_embeddings:
            self.head = build.column("head", config.hidden_size, config.padded_vocab_size, config.init_std)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, [vocab / tp, hidden]."""
        return self.embedding.weight if self.config.tied_embeddings else self.head.weight

    def hidden(self, ids: Tensor, layout: Layout, recall: Recall | None = None) -> Tensor:
        """[B, T] -> [T, B, hidden] after the final norm."""
        x = self.embedding(ids)
        rotary = Rotary.of(layout.position, self.config)
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, layout, rotary, recall, use_reentrant=False)
            else:
                x = layer(x, layout, rotary, recall)
        return self.final_norm(x)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Sum of the token losses of a micro-batch, fp32 scalar."""
        hidden = self.hidden(batch.ids, batch.layout, batch.recall)
        return token_loss_sum(hidden, batch.labels, self.head_weight, self.build)

    @torch.no_grad()
    def logits(self, ids: Tensor, layout: Layout, recall: Recall | None = None) -> Tensor:
        """[B, T] -> logits over the unpadded vocabulary, [B, T, vocab_size]."""
        parts = vocab_logits(self.hidden(ids, layout, recall), self.head_weight, self.build)
        whole = gather_from_tensor_model_parallel_region(parts, group=self.build.tp_group)
        return whole.transpose(0, 1)[..., : self.config.vocab_size]
