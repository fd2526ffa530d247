"""What of a model is trained on one rank: what has gradients and optimizer state, and whose inputs are kept for backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from unfold.model.hf.names import entries
from unfold.model.lora import A, B, fused_layers
from unfold.pretrain.config import RunConfig
from unfold.pretrain.config.trained import ROWS
from unfold.pretrain.train.trainable import is_trained, needs_rows, parameter_names, stages_of

COLUMN_LAYERS = ("attention.qkv", "mlp.gate_up")  # of whose adapters tensor parallelism splits the second matrix
EMBEDDING, HEAD = ROWS


@dataclass(frozen=True)
class Trained:
    """Of one rank of a pipeline stage.

    Attributes:
        layers: of the stage.
        held: parameters, frozen ones included.
        learning: of these, trained.
        matrices: of these, matrices of layers, adapters included.
        adapters: parameters of adapters.
        names: of what is trained in any of the model's layers, without the layer's number; of the rest in full.
        reached: part of the model's layers that the backward pass goes through.
        into_first: whether the input of the first layer that it reaches has a gradient.
        head: whether the output head has a gradient.
        rows: rows of gists and links that are a parameter of their own; 0 where they are none.
    """

    layers: int
    held: int
    learning: int
    matrices: int
    adapters: int
    names: frozenset[str]
    reached: float
    into_first: bool
    head: bool
    rows: int

    def keeps_input(self, layer: str) -> bool:
        """Whether the input of a linear layer is kept, for a gradient of its weight or of its adapters."""
        return not self.names.isdisjoint((f"{layer}.weight", f"{layer}.{A}"))


@lru_cache
def count_trained(config: RunConfig, stage: int = 0) -> Trained:
    """Count. config: of a run whose vocabulary is known."""
    sizes = dict(_sizes(config))
    names = parameter_names(config)
    learning = [name for name in names if is_trained(config, name)]
    here = [name for name in names if stage in stages_of(name, config)]
    taught = [name for name in here if name in set(learning)]
    shapes = {entry.ours: entry.shape(config.model) for entry in entries(config.model)}
    of_layers = [name for name in taught if name.startswith("layers.")]
    in_layers = [int(name.split(".")[1]) for name in learning if name.startswith("layers.")]
    first = 0 if any(name.startswith("embedding.") for name in learning) else min(in_layers, default=config.model.layers)
    head = "embedding" if config.model.tied_embeddings else "head"
    return Trained(
        layers=config.model.layers // config.parallel.pipeline,
        held=sum(sizes[name] for name in here),
        learning=sum(sizes[name] for name in taught),
        matrices=sum(sizes[name] for name in of_layers if len(shapes.get(name, (0, 0))) == 2),
        adapters=sum(sizes[name] for name in here if name.endswith((f".{A}", f".{B}"))),
        names=frozenset(name.split(".", 2)[2] if name.startswith("layers.") else name for name in learning),
        reached=1 - first / config.model.layers,
        into_first=any(name.startswith("embedding.") or name == f"layers.{first}.attention_norm.weight" for name in learning),
        head=any(name.startswith(f"{head}.") for name in learning),
        rows=_rows(config),
    )


def _rows(config: RunConfig) -> int:
    """Ids of gists and links, where their rows are apart."""
    return config.folding.deepest + config.gist.links if config.folding and needs_rows(config) else 0


def _sizes(config: RunConfig) -> Iterator[tuple[str, int]]:
    """(canonical name, elements on a rank) of all parameters."""
    model, tensor, rank = config.model, config.parallel.tensor, config.lora.rank
    for entry in entries(model):
        yield entry.ours, entry.numel(model) // (1 if entry.partition is None else tensor)
    yield from ((name, _rows(config) * model.hidden_size) for name in (EMBEDDING, HEAD))
    if not rank:
        return
    for name, fused in fused_layers(model).items():
        chosen = fused.targeted(config.lora.targets)
        rows = fused.groups * sum(fused.sizes[i] for i in chosen)
        split = (1, tensor) if name in COLUMN_LAYERS else (tensor, 1)
        a, b = len(chosen) * rank * fused.inputs // split[0], rows * rank // split[1]
        for i in range(model.layers):
            yield from ((f"layers.{i}.{name}.{part}", size) for part, size in ((A, a), (B, b)))


def adapter_bytes(config: RunConfig, layer: str, tokens: int, element: int) -> int:
    """What the adapters of a linear layer keep beside its input: what lies between their two matrices; of query, key and value
    also the rows of the second one, by part."""
    if not config.lora.rank:
        return 0
    fused = fused_layers(config.model)[layer]
    chosen = fused.targeted(config.lora.targets)
    between = len(chosen) * config.lora.rank * tokens
    copied = 0
    if fused.groups > 1 and len(chosen) > 1:
        copied = fused.groups * sum(fused.sizes[i] for i in chosen) * config.lora.rank // config.parallel.tensor
    return element * (between + copied)
