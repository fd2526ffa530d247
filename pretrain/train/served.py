"""What the kernels of GPUs do not serve, or no compiler is there for, is refused before anything starts, never computed by a slow
path unasked."""

from __future__ import annotations

import os
import shutil

import torch

from unfold.pretrain.config import RunConfig
from unfold.pretrain.errors import UserError


def refuse_unserved(config: RunConfig, device: torch.device) -> None:
    """UserError, a line per setting that the kernels of compressed attention and recall do not serve on a GPU."""
    if device.type == "cpu" or config.model.attention != "gist":
        return
    errors = unserved(config)
    if errors:
        raise UserError("\n".join(errors))


def refuse_uncompiled(config: RunConfig, device: torch.device) -> None:
    """UserError where train.fuse_pointwise has no compiler: C++ for a CPU; for a GPU C, with which Triton builds launchers."""
    if not config.train.fuse_pointwise:
        return
    variable, names = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"train.fuse_pointwise: true needs a compiler, and {' or '.join(names)} is not found; "
            f"install it, name one in {variable}, or set false"
        )


def unserved(config: RunConfig) -> list[str]:
    """What the kernels of GPUs do not serve of a run, each with what would do."""
    from unfold.kernels.common.launch import HEAD_DIMS
    from unfold.kernels.unfold.tiles import LARGEST_TILE, LONGEST_CHUNK

    model, gist = config.model, config.gist
    instead = "or set model.attention: dense"
    errors = []
    if model.head_dim not in HEAD_DIMS:
        served = ", ".join(map(str, HEAD_DIMS))
        errors.append(f"model.head_dim: {model.head_dim} has no kernels for GPUs; use one of {served}, {instead}")
    settings = [("gist.top_p", gist), *((stage.place("gist.top_p"), stage.config.gist) for stage in config.stages)]
    recalling = [(name, part) for name, part in settings if part.recall != "none"]
    if not recalling:
        return errors
    for name, top_p in dict.fromkeys((name, part.top_p) for name, part in recalling):  # many a stage has that of all
        if top_p is not None:
            errors.append(f"{name}: {top_p} has no kernels for GPUs, which select by number; set topk, or neither")
    group = model.heads // model.kv_heads
    if group > LARGEST_TILE:
        errors.append(f"model.kv_heads: {group} query heads for each of {model.kv_heads}; recall on GPUs serves {LARGEST_TILE}")
    size = max(variant.chunk_sizes[0] for variant in gist.variants)
    longest = size * 3 // 2 if gist.word_aware else size  # a chunk grows by up to half to where a word starts
    if longest > LONGEST_CHUNK:
        grown = f" can grow to {longest}" if gist.word_aware else ""
        errors.append(f"gist.chunk_sizes: a chunk of {size} tokens{grown}; recall on GPUs serves {LONGEST_CHUNK}")
    return errors
