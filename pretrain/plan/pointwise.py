"""Work that is bound by memory, counted: the operations of a layer run on the meta device, where they move nothing but are seen.

An operation is one kernel, which reads its inputs and writes its outputs once; compiled ones are counted kernel by kernel
(:mod:`unfold.pretrain.plan.fused`). Attention's own kernels are not among them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unfold.model.config import ModelConfig
from unfold.model.layers import BuildContext, RMSNorm, Rotary
from unfold.model.loss import CHUNK
from unfold.model.pointwise import Pointwise as Functions
from unfold.model.recompute import Recompute
from unfold.model.transformer import Layer
from unfold.pretrain.config import RunConfig
from unfold.pretrain.plan.activations import FP32, Activations, element_size
from unfold.pretrain.plan.fused import COUNTED
from unfold.pretrain.plan.moved import Moved
from unfold.pretrain.plan.trained import Trained, count_trained

# Of the update, for each parameter of a rank's part: AdamW in one kernel (weight, gradient and two moments read, all but the
# gradient written), the gradient's norm and clipping, the weight in the compute precision from the fp32 one.
UPDATE = 7 * FP32 + 3 * FP32 + FP32


@dataclass(frozen=True)
class Pointwise:
    """Forward and backward of one layer on one rank, recomputation included. bytes: moved; kernels: that move them."""

    bytes: int
    kernels: int

    @classmethod
    def of(cls, config: RunConfig, kept: Activations, backward: bool = True) -> Pointwise:
        """kept: whose tokens they are; backward: also the backward pass."""
        model, train = config.model, config.train
        local = replace(
            model,
            heads=model.heads // kept.tensor,
            kv_heads=model.kv_heads // kept.tensor,
            ffn_size=model.ffn_size // kept.tensor,
        )
        recompute = Recompute(train.activation_checkpointing, mlp_tiles=train.mlp_tiles)
        functions = COUNTED if train.fuse_pointwise else Functions()
        build = replace(BuildContext.alone(), blank=True, recompute=recompute, pointwise=functions)
        with torch.device("meta"):
            layer = Layer(local, build, 0).to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
            moved = count_layer(layer, local, kept.samples, kept.tokens // kept.samples, backward)
            total = moved.total
            if kept.residual_tokens < kept.tokens:  # norms and additions are split along the sequence, the rest is not
                split = 1 - kept.residual_tokens / kept.tokens
                passes = 1 if train.activation_checkpointing == "none" else 2
                total -= round(split * _residual_stream(layer.attention_norm, kept.tokens, passes if backward else 1, backward))
        return cls(total, sum(moved.kernels.values()))


def count_layer(layer: Layer, model: ModelConfig, samples: int, length: int, backward: bool = True) -> Moved:
    """Forward and, if wanted, backward of a layer on its device, without attention. length: tokens per sample."""
    weight = layer.attention.qkv.weight
    # Rotary factors are not the layer's: they are made before.
    rotary = Rotary.of(torch.zeros(samples, length, dtype=torch.int64, device=weight.device), model)
    x = weight.new_empty(length, samples, model.hidden_size, requires_grad=True)
    with Moved() as moved:
        out = layer(x, rotary, lambda _, q, k, v: _NoAttention.apply(q, k, v))
        if backward:
            out.backward(torch.empty_like(out))
    return moved


class _NoAttention(torch.autograd.Function):
    """Stands where attention stands, with inputs and outputs of the same shapes."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in ctx.saved_tensors)


def _residual_stream(norm: RMSNorm, tokens: int, passes: int, backward: bool) -> int:
    """Bytes of a layer's two norms and two additions, with so many forward passes and, if wanted, one backward pass."""
    x = norm.weight.new_empty(tokens, norm.weight.shape[0], requires_grad=True)
    with Moved() as forward:
        out = torch.add(*norm(x, norm(x)))
    with Moved() as back:
        if backward:
            out.backward(torch.empty_like(out))
    return passes * forward.total + back.total


def loss_bytes(config: RunConfig, kept: Activations) -> int:
    """What the loss of a micro-batch moves beside its matrix products, term by term (model/loss.py).

    Of each logit: its fp32 copy is made, its row's maximum taken, subtracted, exponentiated, summed, scaled, and the target's
    place filled; with a teacher as much again, and their difference. Rows are chosen from the hidden states, and their gradients
    put back. In bf16 each chunk adds to the head's gradient in fp32.
    """
    narrow = kept.element < FP32
    distilled = config.distill.logits > 0
    each = (112 + 18 * narrow) if distilled else (40 + 12 * narrow)
    vocabulary = config.model.padded_vocab_size // kept.tensor
    head = vocabulary * config.model.hidden_size
    chunks = -(-kept.targets // CHUNK)
    rows = 9 * kept.element * config.model.hidden_size * kept.targets
    of_head = head * (16 + (10 * chunks if narrow else 0)) if count_trained(config).head else 0
    return each * vocabulary * kept.targets + rows + of_head


def update_bytes(config: RunConfig, trained: Trained, replicas: int) -> int:
    """What an update of a rank's weights moves: ZeRO gives each of the replicas a part. An average reads both, and writes one."""
    average = 3 * FP32 if config.checkpoint.average_decay else 0
    return (UPDATE + element_size(config) + average) * trained.learning // replicas
