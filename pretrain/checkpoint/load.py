"""A run's model in one process: for export, generation and evaluation."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from unfold.model.layers import BuildContext
from unfold.model.parallel.tensor import Alone
from unfold.model.transformer import Transformer
from unfold.pretrain.checkpoint.manifest import Manifest, find_checkpoint
from unfold.pretrain.checkpoint.merged import weights_of
from unfold.pretrain.checkpoint.state import pieces
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.config import RunConfig, parse_saved
from unfold.pretrain.data.tokenizer import RunTokenizer, load_tokenizer
from unfold.pretrain.errors import UserError


@dataclass(frozen=True)
class FoundRun:
    """A checkpoint and what belongs to it, its weights not read.

    Attributes:
        directory: the checkpoint's.
        config: of the run, without stages: the model's rotary positions and the length of samples are those of the last step.
    """

    directory: Path
    config: RunConfig
    manifest: Manifest
    tokenizer: RunTokenizer


@dataclass(frozen=True)
class LoadedRun:
    """A checkpoint's model (fp32, eval mode, on this machine's best device) and what belongs to it."""

    model: Transformer
    config: RunConfig
    manifest: Manifest
    tokenizer: RunTokenizer


def find_run(run_dir: str | Path, step: int | None) -> FoundRun:
    """Find a checkpoint of a run, by default the newest whole one.

    Raises:
        UserError: no such run or checkpoint, a damaged one asked for by its step, or another tokenizer.
    """
    run_dir = Path(run_dir)
    directory, manifest = find_checkpoint(run_dir, step, lambda text: print(text, file=sys.stderr, flush=True))
    config = parse_saved(manifest.config, f"{directory}/manifest.json").after(manifest.step)
    tokenizer = load_tokenizer(run_dir / "tokenizer", 0, f"--run-dir {run_dir}")
    if tokenizer.hash != manifest.tokenizer_hash:
        raise UserError(f"{run_dir}/tokenizer: is not the tokenizer that the run was trained with (hash differs)")
    return FoundRun(directory, config, manifest, tokenizer)


def load_model(run: FoundRun) -> Transformer:
    """Its model in fp32 and eval mode, on this machine's best device, whatever layout wrote it."""
    model = Transformer(run.config.model, BuildContext(Alone(), run.config.train.seed, blank=True))
    read_weights(model, weights_of(run.directory, run.config))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_run(run_dir: str | Path, step: int | None = None) -> LoadedRun:
    """Find and load a checkpoint of a run. Raises UserError as :func:`find_run`."""
    run = find_run(run_dir, step)
    return LoadedRun(load_model(run), run.config, run.manifest, run.tokenizer)


@torch.no_grad()
def read_weights(model: Transformer, source: TensorDirectory) -> None:
    """Fill a model that holds every parameter whole from a checkpoint's tensors."""
    for name, parameter in model.named_parameters():
        parts = pieces(f"model.{name}", parameter)
        for piece, shape in parts:
            source.expect(piece, shape)
        for (piece, _), rows in zip(parts, parameter.chunk(len(parts)), strict=True):
            rows.copy_(source.read(piece))
