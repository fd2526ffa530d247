"""Low-rank adapters beside the linear layers, as PEFT names and scales them.

A fused layer of ours holds several of Hugging Face's (query, key and value; gate and up), each of which has an adapter of its
own. Their first matrices are stacked (``lora_a`` [parts * rank, inputs]); of their second ones the rows lie as the fused
weight's do (``lora_b`` [rows of the parts, rank]), so tensor parallelism splits both as it splits the weight.

What crosses tensor-parallel ranks is of the adapter's width: beside a column layer every rank computes the narrow product whole,
and its gradient is summed; beside a row layer the narrow products are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unfold.model.config import LoraConfig, ModelConfig
from unfold.model.parallel.megatron import set_tensor_model_parallel_attributes
from unfold.model.parallel.tensor import (
    ColumnLinear,
    Group,
    RowLinear,
    copy_to_group,
    gather_sequence,
    scatter_sum_sequence,
    sum_over_group,
)

A, B = "lora_a", "lora_b"


@dataclass(frozen=True)
class Fused:
    """The layers of Hugging Face that one linear layer of ours holds, whole.

    Attributes:
        names: theirs, in the order of its rows.
        sizes: rows of each within a group.
        groups: how often this order repeats (KV heads); 1 where tensor parallelism splits each part by itself.
        inputs: columns.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int
    inputs: int

    def targeted(self, targets: Sequence[str]) -> list[int]:
        """Which of the layers have an adapter."""
        return [i for i, name in enumerate(self.names) if name in targets]

    def stride(self, chosen: Sequence[int]) -> int:
        """How many tensors of a checkpoint hold the rows of some of its layers.

        Parts that tensor parallelism splits each by itself (gate and up) are apart. Those of query, key and value, whose KV heads
        are split, are not; also where there is one KV head.
        """
        sizes = {self.sizes[i] for i in chosen}
        return len(chosen) if self.groups == 1 and len(sizes) == 1 else 1

    def in_place(self, parts: Sequence[Tensor | None], dim: int) -> Tensor:
        """Rows of its layers (None: zeros), [.., rows of a part, ..] at ``dim`` -> [.., all rows, ..]"""
        like = next(part for part in parts if part is not None)
        blocks = []
        for part, size in zip(parts, self.sizes):
            if part is None:
                shape = [*like.shape]
                shape[dim] = self.groups * size
                part = like.new_zeros(shape)
            blocks.append(part.unflatten(dim, (self.groups, size)))
        return torch.cat(blocks, dim + 1).flatten(dim, dim + 1)

    def apart(self, rows: Tensor, chosen: Sequence[int]) -> list[Tensor]:
        """The rows [rows of the chosen, ..] of some of its layers -> those of each [rows of one, ..]"""
        sizes = [self.sizes[i] for i in chosen]
        return [part.flatten(0, 1) for part in rows.unflatten(0, (self.groups, sum(sizes))).split(sizes, 1)]


def fused_layers(config: ModelConfig) -> dict[str, Fused]:
    """The linear layers of one layer of a model, by our names."""
    head, hidden, ffn = config.head_dim, config.hidden_size, config.ffn_size
    query = config.heads // config.kv_heads * head
    return {
        "attention.qkv": Fused(("q_proj", "k_proj", "v_proj"), (query, head, head), config.kv_heads, hidden),
        "attention.output": Fused(("o_proj",), (hidden,), 1, config.heads * head),
        "mlp.gate_up": Fused(("gate_proj", "up_proj"), (ffn, ffn), 1, hidden),
        "mlp.down": Fused(("down_proj",), (hidden,), 1, ffn),
    }


@dataclass(frozen=True)
class Adapter:
    """How the adapters of one linear layer are computed; their weights are the layer's ``lora_a`` and ``lora_b``.

    Attributes:
        fused: what the layer holds of this rank.
        chosen: its parts with an adapter.
        rank, scale: of each.
    """

    fused: Fused
    chosen: tuple[int, ...]
    rank: int
    scale: float

    def beside_column(self, x: Tensor, a: Tensor, b: Tensor, group: Group, sequence_split: bool) -> Tensor:
        """What is added to a column layer's output: x [T, B, inputs] (T / n under sequence parallelism) -> [T, B, outputs / n]"""
        if sequence_split:
            narrow = gather_sequence(x @ copy_to_group(a, group).t(), group)
        else:
            narrow = copy_to_group((x @ a.t()).contiguous(), group)
        narrow = narrow * self.scale
        parts: list[Tensor | None] = [None] * len(self.fused.names)
        rows = self.fused.apart(b, self.chosen)
        for i, mine, own in zip(self.chosen, narrow.split(self.rank, -1), rows):
            parts[i] = mine @ own.t()
        return self.fused.in_place(parts, narrow.dim() - 1)

    def beside_row(self, x: Tensor, a: Tensor, b: Tensor, group: Group, sequence_split: bool) -> Tensor:
        """What is added to a row layer's output: x [T, B, inputs / n] -> [T, B, outputs] (T / n under sequence parallelism)"""
        narrow = (x @ a.t()).contiguous()
        if sequence_split:
            narrow, b = scatter_sum_sequence(narrow, group), copy_to_group(b, group)
        else:
            narrow = sum_over_group(narrow, group)
        return narrow * self.scale @ b.t()


def add_adapters(layer: nn.Module, name: str, config: ModelConfig, lora: LoraConfig, normal: Callable, group: Group) -> None:
    """Give the linear layers of a layer their adapters: ``lora_a`` at random as PEFT does, ``lora_b`` zero.

    Args:
        name: the layer's, ``layers.3``.
        normal: ``(parameter's name, std) -> initialiser``, alike under every layout.
        group: tensor-parallel ranks.
    """
    for part, fused in fused_layers(config).items():
        chosen = fused.targeted(lora.targets)
        if chosen:
            _add(layer.get_submodule(part), f"{name}.{part}", fused, chosen, lora, normal, group)


def _add(
    linear: ColumnLinear | RowLinear,
    name: str,
    fused: Fused,
    chosen: list[int],
    lora: LoraConfig,
    normal: Callable,
    group: Group,
) -> None:
    ranks, width = group.size(), len(chosen) * lora.rank
    a = torch.empty(width, fused.inputs)
    # PEFT's distribution is uniform, with this deviation: a normal one serves as well.
    normal(f"{name}.{A}", 1 / math.sqrt(3 * fused.inputs))(a)
    rows = fused.groups * sum(fused.sizes[i] for i in chosen)
    column = isinstance(linear, ColumnLinear)
    if column:
        a, b = nn.Parameter(a), nn.Parameter(torch.zeros(rows // ranks, lora.rank))
        # Each part of gate and up is split by itself; of query, key and value the KV heads are.
        set_tensor_model_parallel_attributes(b, True, 0, fused.stride(chosen))
        groups = fused.groups // ranks if fused.groups > 1 else 1
        sizes = fused.sizes if fused.groups > 1 else tuple(size // ranks for size in fused.sizes)
        fused = Fused(fused.names, sizes, groups, fused.inputs)
    else:
        a, b = nn.Parameter(a.chunk(ranks, 1)[group.rank()].clone()), nn.Parameter(torch.zeros(rows, lora.rank))
        set_tensor_model_parallel_attributes(a, True, 1, 1)
    linear.register_parameter(A, a)
    linear.register_parameter(B, b)
    linear.adapter = Adapter(fused, tuple(chosen), lora.rank, lora.scale)
