"""The parts of a layer that know nothing of gists: initial weights, norm, rotary positions, feed-forward."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unfold.model.config import LoraConfig, ModelConfig
from unfold.model.gist import Layout
from unfold.model.gist.parts import turning
from unfold.model.parallel.context import ContextParallel, ContextPart
from unfold.model.parallel.megatron import ModelParallelConfig
from unfold.model.parallel.tensor import Alone, ColumnLinear, Group, RowLinear, copy_to_group
from unfold.model.pointwise import Pointwise, rotate
from unfold.model.recompute import Again, Recompute


@dataclass(frozen=True)
class BuildContext:
    """What building a layer needs beyond its shape.

    Attributes:
        tp_group: tensor-parallel process group; Alone() where no other process holds a part of the layers.
        seed: initial weights are a pure function of it and of the parameter's canonical name.
        sequence_parallel: split the residual stream over the tensor-parallel group along the sequence.
        context: how the sequence is spread over ranks; None where every rank has all of it.
        blank: leave weights as memory has them, because all of them are about to be read from a file.
        recompute: what layers compute again in backward.
        rows: ids whose rows of embedding and head are parameters of their own (:mod:`unfold.model.rows`).
        lora: adapters beside the linear layers (:mod:`unfold.model.lora`); None: there are none.
        pointwise: the small operations of a layer, as they are or compiled.
    """

    tp_group: Group
    seed: int
    sequence_parallel: bool = False
    context: ContextParallel | None = None
    blank: bool = False
    recompute: Recompute = Recompute()
    rows: tuple[int, ...] = ()
    lora: LoraConfig | None = None
    pointwise: Pointwise = Pointwise()

    @classmethod
    def alone(cls, seed: int = 0) -> BuildContext:
        """For a whole model on this process, which needs no torch.distributed."""
        return cls(Alone(), seed)

    @property
    def sequence_split(self) -> bool:
        """Whether sequence parallelism has an effect."""
        return self.sequence_parallel and self.tp_group.size() > 1

    def part_of(self, layout: Layout) -> ContextPart | None:
        """What of a micro-batch this rank holds under context parallelism; None: all."""
        return None if self.context is None else self.context.of(layout)

    def own_part(self, x: Tensor, layout: Layout) -> Tensor:
        """That of a tensor [B, T] of the micro-batch with this layout."""
        part = self.part_of(layout)
        return x if part is None else part.take(x, 1)

    def megatron(self) -> ModelParallelConfig:
        """The configuration of megatron-core's layers. Weights are made on CPU in fp32, alike under every layout."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.tp_group.size(), use_cpu_initialization=True, params_dtype=torch.float32
        )

    def normal(self, name: str, std: float) -> Callable[[Tensor], Tensor]:
        """Initialiser of the parameter with this canonical name, the same under every parallel layout."""
        if self.blank:
            return lambda weight: weight
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        seed = int.from_bytes(digest[:6], "big")

        def init(weight: Tensor) -> Tensor:
            return nn.init.normal_(weight, 0.0, std, generator=torch.Generator().manual_seed(seed))

        return init

    def column(self, name: str, inputs: int, outputs: int, std: float, stride: int = 1, bias: bool = False) -> ColumnLinear:
        """A linear layer with its outputs split over the tensor-parallel group; a bias starts at zero."""
        return ColumnLinear(
            inputs,
            outputs,
            config=self.megatron(),
            init_method=self.normal(f"{name}.weight", std),
            stride=stride,
            bias=bias,
            tp_group=self.tp_group,
            sequence_split=self.sequence_split,
        )

    def row(self, name: str, inputs: int, outputs: int, std: float, bias: bool = False) -> RowLinear:
        """A linear layer with its inputs split over the tensor-parallel group; outputs are summed, its bias is whole."""
        return RowLinear(
            inputs,
            outputs,
            config=self.megatron(),
            init_method=self.normal(f"{name}.weight", std),
            bias=bias,
            tp_group=self.tp_group,
            sequence_split=self.sequence_split,
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last dimension, computed in at least fp32."""

    def __init__(self, size: int, eps: float, build: BuildContext, of_heads: bool = False):
        """of_heads: it is applied to this rank's heads, rather than to the residual stream."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.build = eps, build
        # Each tensor-parallel rank norms its heads, or its part of a split sequence: their gradients are summed.
        self.norms_a_part = of_heads or build.sequence_split

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[.., size] -> [.., size]; with ``added``, of the same shape: x + added, and the norm of that."""
        weight, pointwise = self.weight, self.build.pointwise
        if self.norms_a_part:
            weight = copy_to_group(weight, self.build.tp_group)
        if added is None:
            return pointwise.rms_norm(x, weight, self.eps)
        return pointwise.add_and_norm(x, added, weight, self.eps)


def rotary_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of every pair of a head's dimensions, fp32 [head_dim / 2]."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (even / config.head_dim)
    scaling = config.rope_scaling
    if scaling.kind == "default":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "yarn":
        return torch.lerp(frequency / scaling.factor, frequency, _yarn_kept(config, device))
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequency / scaling.factor, frequency, kept.clamp(0, 1))


def _yarn_kept(config: ModelConfig, device: torch.device | str) -> Tensor:
    """How much of every frequency YaRN keeps, 1 for fast and 0 for slow ones, fp32 [head_dim / 2] (arXiv 2309.00071).

    The border between fast and slow lies at whole pairs, as in every published implementation.
    """
    scaling, dim = config.rope_scaling, config.head_dim
    pair = lambda turns: (  # the pair of dimensions that turns so often within the first training's longest sequence
        dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
    )
    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), dim - 1)
    slow = (torch.arange(dim // 2, dtype=torch.float32, device=device) - first) / ((last - first) or 1e-3)
    return 1 - slow.clamp(0, 1)


@dataclass(frozen=True)
class Rotary:
    """Rotary factors of a micro-batch, at least fp32, [B, T, 1, head_dim / 2]; made once, shared by all layers."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, position: Tensor, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Rotary:
        """position: [B, T] int64, the raw index within the document; dtype: of what is rotated."""
        # Scores depend on differences of positions alone only as far as the factors are exact: fp64 has exact ones.
        wide = torch.promote_types(dtype, torch.float32)
        angle = position[:, :, None, None].to(wide) * rotary_frequencies(config, position.device).to(wide)
        magnitude = config.rope_scaling.magnitude
        return cls(angle.cos() * magnitude, angle.sin() * magnitude)

    @classmethod
    def turning(cls, here: Tensor, there: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotary:
        """What turns keys that were rotated for the positions ``here`` into those of the positions ``there``, both [n] int64.

        Args:
            dtype: of the keys.

        Returns:
            Factors of shape [n, head_dim / 2], for keys [.., n, head_dim].
        """
        factors = [cls.of(position[None], config, dtype) for position in (here, there)]
        pairs = [(f.cos[0, :, 0], f.sin[0, :, 0]) for f in factors]
        return cls(*turning(*pairs, torch.promote_types(dtype, torch.float32)))

    def apply(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> same, rotated."""
        return rotate(x, self.cos, self.sin)


class MLP(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)); gate and up are one matrix."""

    def __init__(self, config: ModelConfig, build: BuildContext, name: str, residual_std: float):
        super().__init__()
        sizes = config.hidden_size, 2 * config.ffn_size
        # stride 2: each tensor-parallel rank holds its part of the gate and of the up projection.
        self.gate_up = build.column(f"{name}.gate_up", *sizes, config.init_std, stride=2, bias=config.mlp_bias)
        self.down = build.row(f"{name}.down", config.ffn_size, config.hidden_size, residual_std, bias=config.mlp_bias)

        self.tiles, self.swiglu = build.recompute.mlp_tiles, build.pointwise.swiglu

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """[T, B, hidden] -> [T, B, hidden]

        again: of the checkpointed part that this ends, whose second pass needs no output.
        """
        tiles = min(self.tiles, len(x))
        if tiles == 1:
            return self.down(self.swiglu(self.gate_up(x)))
        first, second = self.gate_up.own(), self.down.own()

        def tile(x: Tensor, *weights: Tensor) -> Tensor:
            gate_up = self.gate_up.product(x, *weights[: len(first)])
            return self.down.product(self.swiglu(gate_up), *weights[len(first) :])

        return _Tiled.apply(tile, tiles, again is not None and again.now, x, *first, *second)


class _Tiled(torch.autograd.Function):
    """A function of each token, computed piece by piece along the sequence and, in backward, once more.

    DeepSpeed's TiledMLP lets every piece add to ``weight.grad`` by itself: in bf16 that rounds the sum once per piece, hooks that
    ZeRO or a pipeline put on a weight run once per piece too, and it cuts dimension -2, which is the samples here. So: sums in
    fp32, and one gradient per weight, handed to autograd like any other. Under sequence parallelism a piece is one of this rank's
    part, gathered and scattered by itself.
    """

    @staticmethod
    def forward(ctx, tile: Callable[..., Tensor], tiles: int, skip: bool, x: Tensor, *weights: Tensor) -> Tensor:
        """skip: the output is not looked at."""
        ctx.tile, ctx.tiles = tile, tiles
        ctx.save_for_backward(x, *weights)
        out = torch.empty_like(x)
        if not skip:
            for piece, into in zip(x.tensor_split(tiles), out.tensor_split(tiles)):
                into.copy_(tile(piece, *weights))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        x, *weights = ctx.saved_tensors
        trained = ctx.needs_input_grad[4:]
        weights = [w.detach().requires_grad_(needed) for w, needed in zip(weights, trained)]
        learning = [w for w in weights if w.requires_grad]
        sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in learning]
        d_x = torch.empty_like(x)
        for piece, d_piece, into in zip(*(y.tensor_split(ctx.tiles) for y in (x, d_out, d_x))):
            piece = piece.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.tile(piece, *weights)
            d, *of_weights = torch.autograd.grad(out, [piece, *learning], d_piece)
            into.copy_(d)
            for total, one in zip(sums, of_weights):
                total += one
        totals = iter(sums)
        return None, None, None, d_x, *(next(totals).to(w.dtype) if w.requires_grad else None for w in weights)
