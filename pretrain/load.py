"""A run's model in one process: for export, generation and evaluation."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from model.layers import BuildContext
from model.transformer import Transformer
from pretrain import parallel as parallel_groups
from pretrain.checkpoint import Manifest, find_checkpoint
from pretrain.config import ParallelConfig, RunConfig, parse_config
from pretrain.engine_state import from_pieces, piece_names, to_pieces
from pretrain.errors import UserError
from pretrain.tokenizer import TokenizerInfo, load_tokenizer


@dataclass(frozen=True)
class LoadedRun:
    """A checkpoint's model (fp32, eval mode, on this machine's best device) and what belongs to it."""

    model: Transformer
    config: RunConfig
    manifest: Manifest
    tokenizer: TokenizerInfo


def load_run(run_dir: Path, step: int | None) -> LoadedRun:
    """Load a checkpoint of a run, whatever layout wrote it.

    Raises:
        UserError: no such run or checkpoint, a damaged one asked for by its step, or another tokenizer.
    """
    directory, manifest = find_checkpoint(run_dir, step, lambda text: print(text, file=sys.stderr, flush=True))
    config = parse_config(manifest.config, f"{directory}/manifest.json")
    tokenizer = load_tokenizer(run_dir / "tokenizer", 0, f"--run-dir {run_dir}")
    if tokenizer.hash != manifest.tokenizer_hash:
        raise UserError(f"{run_dir}/tokenizer: is not the tokenizer that the run was trained with (hash differs)")
    parallel = parallel_groups.initialize(dataclasses.replace(ParallelConfig(), timeout_minutes=30.0))
    model = Transformer(config.model, BuildContext(parallel.tensor_group, config.train.seed))
    read_weights(model, directory)
    return LoadedRun(model.to(parallel.device).eval(), config, manifest, tokenizer)


def read_weights(model: Transformer, directory: Path) -> None:
    """Fill a model that holds every parameter whole from a checkpoint directory."""
    named = dict(model.named_parameters())
    state = {}
    for name, parameter in named.items():
        pieces = to_pieces(parameter, torch.empty_like(parameter, dtype=torch.float32), None)
        state.update({f"model.{n}": piece for n, piece in zip(piece_names(name, parameter), pieces)})
    dcp.load(state, checkpoint_id=str(directory))
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(from_pieces(parameter, [state[f"model.{n}"] for n in piece_names(name, parameter)]))
