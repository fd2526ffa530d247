"""A checkpoint's weights as a model without adapters has them: each adapter's product is added to what it stands beside."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from unfold.model.config import LoraConfig, ModelConfig
from unfold.model.lora import A, B, fused_layers
from unfold.pretrain.checkpoint.state import AVERAGE
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.config import RunConfig

MATRIX = re.compile(r"model\.(layers\.\d+)\.(.+)\.weight(?:\.(\d+))?")  # the last: of gate and up, which of them


def weights_of(directory: Path, config: RunConfig) -> TensorDirectory:
    """The tensors of a run's checkpoint, adapters merged where it has some. Raises UserError as TensorDirectory."""
    return MergedTensors(directory, config.model, config.lora) if config.lora.rank else TensorDirectory(directory)


def averaged_weights_of(directory: Path, config: RunConfig, row_ids: Sequence[int]) -> TensorDirectory:
    """The same of the average that the run kept. row_ids: gist and link ids, whose rows may have been trained alone."""
    return _AveragedTensors(directory, config.model, config.lora, row_ids)


def adapter_parts(
    read: Callable[[str], Tensor], layer: str, part: str, model: ModelConfig, lora: LoraConfig
) -> dict[int, tuple[Tensor, Tensor]]:
    """The adapters beside one linear layer of ours: {number among the layers that it holds: (A [rank, in], B [out, rank])}

    read: a tensor by its name; layer, part: such as ``layers.3``, ``attention.qkv``.
    """
    fused = fused_layers(model)[part]
    chosen = fused.targeted(lora.targets)
    if not chosen:
        return {}
    prefix = f"model.{layer}.{part}"
    a = read(f"{prefix}.{A}").split(lora.rank)
    if fused.stride(chosen) > 1:
        b = [read(f"{prefix}.{B}.{i}") for i in range(len(chosen))]
    else:
        b = fused.apart(read(f"{prefix}.{B}"), chosen)
    return dict(zip(chosen, zip(a, b)))


class MergedTensors(TensorDirectory):
    """Reads the matrices of a checkpoint with its adapters merged into them."""

    def __init__(self, directory: Path, model: ModelConfig, lora: LoraConfig):
        super().__init__(directory)
        self._model, self._lora, self._fused = model, lora, fused_layers(model)

    def read(self, name: str, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """A rectangle of a tensor, by default all of it."""
        result = self._stored(name, offsets, shape)
        found = MATRIX.fullmatch(name)
        if not self._lora.rank or found is None or found[2] not in self._fused:
            return result
        beside = adapter_parts(self._stored, found[1], found[2], self._model, self._lora)
        if found[3] is not None:
            beside = {0: beside[int(found[3])]} if int(found[3]) in beside else {}
        if not beside:
            return result
        (row, column), (rows, columns) = offsets or (0, 0), result.shape
        delta = torch.zeros(rows, columns)
        for whole, a in self._products(found[2], beside, found[3] is not None):
            delta += whole[row : row + rows] @ a[:, column : column + columns]
        return (result.float() + self._lora.scale * delta).to(result.dtype)

    def _stored(self, name: str, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """The tensor, or a rectangle of it, as it is stored."""
        return super().read(name, offsets, shape)

    def _products(self, part: str, beside: dict[int, tuple[Tensor, Tensor]], alone: bool):
        """(B over all rows of the matrix, A) of each adapter."""
        fused = self._fused[part]
        for i, (a, b) in beside.items():
            parts = [b if j == i else None for j in range(len(fused.names))]
            yield b if alone else fused.in_place(parts, 0), a


class _AveragedTensors(MergedTensors):
    """Reads, for weights that a run kept the average of, that average."""

    def __init__(self, directory: Path, model: ModelConfig, lora: LoraConfig, row_ids: Sequence[int]):
        super().__init__(directory, model, lora)
        self._row_ids = sorted(row_ids)

    def _stored(self, name: str, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """The average where there is one, whole tensors only."""
        assert offsets is None, name
        kind, _, base = name.partition(".")
        average = f"{AVERAGE}.{base}"
        if kind == "model" and average in self.shapes:
            return super()._stored(average)
        result, rows = super()._stored(name), f"{average.removesuffix('weight')}rows"
        if base in ("embedding.weight", "head.weight") and rows in self.shapes:
            result[self._row_ids] = super()._stored(rows)
        return result
