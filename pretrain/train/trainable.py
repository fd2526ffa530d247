"""What of a model is trained, and how fast: the optimizer's groups."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from unfold.model.hf.names import entries
from unfold.model.lora import A, B, fused_layers
from unfold.pretrain.config import RunConfig
from unfold.pretrain.config.trained import GISTS, ROWS, chosen, hits
from unfold.pretrain.errors import UserError


def needs_rows(config: RunConfig) -> bool:
    """Whether the rows of gist and link ids are to be a parameter of their own."""
    return any(pattern == GISTS or pattern.endswith(".rows") for _, pattern in _patterns(config))


def _patterns(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(setting, pattern without its exclamation mark)"""
    yield from (("train.trainable", p.removeprefix("!")) for p in config.train.trainable)
    for i, rate in enumerate(config.optimizer.rates):
        yield from ((f"optimizer.rates.{i}.match", p.removeprefix("!")) for p in rate.match)


def parameter_names(config: RunConfig) -> list[str]:
    """Canonical names of all parameters of a run's model, adapters and rows of their own included."""
    names = [entry.ours for entry in entries(replace(config.model, vocab_size=max(1, config.model.vocab_size)))]
    if needs_rows(config):
        names += ROWS[: 1 if config.model.tied_embeddings else 2]
    if config.lora.rank:
        adapted = [name for name, fused in fused_layers(config.model).items() if fused.targeted(config.lora.targets)]
        names += [f"layers.{i}.{name}.{part}" for i in range(config.model.layers) for name in adapted for part in (A, B)]
    return names


def is_trained(config: RunConfig, name: str) -> bool:
    """Whether a parameter of this canonical name is trained."""
    if config.lora.rank:
        return name.endswith((f".{A}", f".{B}")) or chosen(config.train.trainable, name)
    return not config.train.trainable or chosen(config.train.trainable, name)


def rate_factor(config: RunConfig, name: str) -> float:
    """What a parameter's learning rate is multiplied by."""
    return next((rate.factor for rate in config.optimizer.rates if chosen(rate.match, name)), 1.0)


def check_trainable(config: RunConfig, reserved_ids: Sequence[int]) -> None:
    """Raises UserError for a pattern that means no parameter, and where nothing is trained, or nothing of a stage.

    reserved_ids: the tokenizer's gists and links, whose rows may be trained alone.
    """
    names = parameter_names(config)
    if needs_rows(config) and not reserved_ids:
        raise UserError(
            f"train.trainable: {GISTS!r} means no row, since the tokenizer has neither gists nor links; "
            "give it some (import-tokenizer --gist-levels), or name other parameters"
        )
    for setting, pattern in _patterns(config):
        if not any(hits(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, 1, 0.4) or [names[0]]
            raise UserError(
                f"{setting}: {pattern!r} means no parameter of this model; names are such as {near[0]}, and * stands for any part"
            )
    trained = [name for name in names if is_trained(config, name)]
    if not trained:
        raise UserError(f"train.trainable: {list(config.train.trainable)} leaves nothing to train")
    stages = config.parallel.pipeline
    idle = set(range(stages)) - {stage for name in trained for stage in stages_of(name, config)}
    if idle:
        which = ", ".join(map(str, sorted(idle)))
        raise UserError(
            f"train.trainable: {list(config.train.trainable)} leaves pipeline stage {which} nothing to train, which DeepSpeed "
            "cannot run; train norms too (layers.*norm*), or set a smaller parallel.pipeline"
        )


def stages_of(name: str, config: RunConfig) -> list[int]:
    """The pipeline stages that hold a parameter."""
    last = config.parallel.pipeline - 1
    if name.startswith("layers."):
        return [int(name.split(".")[1]) * config.parallel.pipeline // config.model.layers]
    if name.startswith("embedding."):
        return [0, last] if config.model.tied_embeddings else [0]
    return [last]


def tied_attributes(config: RunConfig) -> list[str]:
    """The trained parameters of an embedding, by their names in its module."""
    names = [name for name in parameter_names(config) if name.startswith("embedding.") and is_trained(config, name)]
    return [name.removeprefix("embedding.") for name in names]


def freeze(model: nn.Module, config: RunConfig, rename: Callable[[str], str] = str) -> None:
    """Only what is trained gets gradients. rename: the model's parameter names -> canonical ones."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(config, rename(name)))


def parameter_groups(
    model: nn.Module,
    config: RunConfig,
    rename: Callable[[str], str] = str,
    kinds: Sequence[Callable[[nn.Parameter], bool]] = (lambda p: p.dim() > 1, lambda p: True),
) -> Iterator[tuple[int, dict]]:
    """(number of the kind, {params, rate_factor}) of what is trained: the first kind that a parameter is of counts."""
    found: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = next(i for i, is_one in enumerate(kinds) if is_one(parameter))
            found.setdefault((kind, rate_factor(config, rename(name))), []).append(parameter)
    # The usual rate first: its first group is where the counter of steps is read.
    for (kind, factor), parameters in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != 1, item[0][1])):
        yield kind, {"params": parameters, "rate_factor": factor}
