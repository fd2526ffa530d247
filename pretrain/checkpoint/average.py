"""``python -m pretrain average``: the mean of several checkpoints' weights, or the exponential average that a run kept.

The result is a directory like that of ``import``: ``export``, ``generate``, ``evaluate`` and ``train.init_from`` take it.
Adapters are merged before the mean is taken, since the product of two means is no mean of products.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from unfold.model.config import LoraConfig
from unfold.model.hf.names import entries
from unfold.pretrain.checkpoint.load import FoundRun, find_run
from unfold.pretrain.checkpoint.manifest import (
    MANIFEST,
    checkpoint_directories,
    checkpoint_name,
    read_manifest,
    step_of,
    sync_directory,
    write_atomically,
)
from unfold.pretrain.checkpoint.merged import averaged_weights_of, weights_of
from unfold.pretrain.checkpoint.state import AVERAGE
from unfold.pretrain.checkpoint.tensors import Chunk, TensorDirectory, write_tensor_file
from unfold.pretrain.config import RunConfig
from unfold.pretrain.errors import UserError
from unfold.pretrain.hf.directory import new_directory

FILE_BYTES = 5 * 10**9  # a file that is full gets no further tensor


def average(run_dir: Path, last: int | None, steps: Sequence[int] | None, output: Path) -> str:
    """Write the average of a run's newest ``last`` checkpoints, of those of ``steps``, or (neither) the one that it kept.

    Returns:
        A line on what was written.

    Raises:
        UserError: the output exists, a checkpoint is missing, damaged or of a stage with other rotary settings, or the run kept
            no average.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists; name a new directory")
    if last is not None and last < 2:
        raise UserError(f"--last {last}: is below 2; one checkpoint needs no average")
    newest = find_run(run_dir, max(steps) if steps else None)
    if last is None and not steps:
        tensors = averaged_weights_of(newest.directory, newest.config, newest.tokenizer.reserved_ids)
        if not any(name.startswith(f"{AVERAGE}.") for name in tensors.shapes):
            raise UserError(f"--exponential: {newest.directory} holds no average; set checkpoint.average_decay in the run")
        sources, what = [tensors], f"the exponential average after step {newest.manifest.step}"
    else:
        runs = [find_run(run_dir, step) for step in sorted(set(steps))] if steps else _newest(run_dir, last)
        if other := [run.manifest.step for run in runs if run.config.model != newest.config.model]:
            raise UserError(
                f"steps {', '.join(map(str, other))}: were trained with other rotary settings (train.stages) than step "
                f"{newest.manifest.step}; average checkpoints of one stage"
            )
        sources = [weights_of(run.directory, run.config) for run in runs]
        what = f"the mean of steps {', '.join(str(run.manifest.step) for run in runs)}"
    with new_directory(output) as partial:
        _write(newest, sources, partial)
    return f"{output}: {what}"


def _newest(run_dir: Path, count: int) -> list[FoundRun]:
    whole = []
    for directory in checkpoint_directories(run_dir):
        try:
            read_manifest(directory)
        except UserError:
            continue
        whole.append(step_of(directory))
        if len(whole) == count:
            return [find_run(run_dir, step) for step in reversed(whole)]
    raise UserError(f"--last {count}: {run_dir} has {len(whole)} whole checkpoints; keep more (checkpoint.keep), or give fewer")


def _write(run: FoundRun, sources: list[TensorDirectory], directory: Path) -> None:
    """A run's directory with the mean of these weights as its only checkpoint."""
    config = _without_adapters(run.config)
    checkpoint = directory / "checkpoints" / checkpoint_name(run.manifest.step)
    checkpoint.mkdir(parents=True)
    files = {}
    groups = list(_groups(config, sources))
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        files[name] = write_tensor_file(checkpoint / name, group)
    manifest = dataclasses.replace(run.manifest, config=config.to_dict(), files=files, world=1)
    write_atomically(checkpoint / MANIFEST, json.dumps(asdict(manifest), indent=1))
    sync_directory(checkpoint)
    shutil.copytree(run.tokenizer.directory, directory / "tokenizer")
    write_atomically(directory / "config.yaml", config.to_yaml())


def _without_adapters(config: RunConfig) -> RunConfig:
    """The configuration of the same model, which has no adapters any more."""
    train = dataclasses.replace(config.train, trainable=(), init_from="")
    return dataclasses.replace(config, lora=LoraConfig(), train=train)


def _groups(config: RunConfig, sources: list[TensorDirectory]) -> Iterator[list[Chunk]]:
    """The tensors, file by file; each is read when it is written."""
    group: list[Chunk] = []
    for entry in entries(config.model):
        shape = entry.shape(config.model)
        part = (shape[0] // entry.pieces, *shape[1:])
        for name in (f"model.{piece}" for piece in entry.piece_names()):
            chunk = Chunk(name, (0,) * len(part), part, sources[0].dtype(name), _mean(name, sources))
            if group and sum(c.bytes for c in [*group, chunk]) > FILE_BYTES:
                yield group
                group = []
            group.append(chunk)
    yield group


def _mean(name: str, sources: list[TensorDirectory]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        total = sources[0].read(name).double()
        for source in sources[1:]:
            total += source.read(name)
        return (total / len(sources)).to(sources[0].dtype(name))

    return read
