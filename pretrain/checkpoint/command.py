"""``python -m pretrain checkpoints DIR``: list, verify, show, prune, convert."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from unfold.pretrain.checkpoint.manifest import (
    Manifest,
    checkpoint_directories,
    find_checkpoint,
    peek_manifest,
    read_manifest,
    remove_checkpoint,
    step_of,
    superfluous,
    write_atomically,
)
from unfold.pretrain.checkpoint.tensors import Chunk, TensorDirectory, write_tensor_file
from unfold.pretrain.config import flatten
from unfold.pretrain.errors import UserError


def run_command(args: argparse.Namespace) -> Iterator[str]:
    """Lines of output. Raises UserError, after the lines, when --verify finds damage."""
    if not (args.run_dir / "checkpoints").is_dir():
        raise UserError(f"{args.run_dir}: is not a run directory (it has no checkpoints/)")
    for flag, given, needs in (
        ("--keep", args.keep is not None, "--prune"),
        ("--keep-every", args.keep_every is not None, "--prune"),
        ("--optimizer", args.optimizer, "--convert"),
    ):
        if given and not getattr(args, needs.removeprefix("--")):
            raise UserError(f"{flag}: says nothing without {needs}; give {needs}, too, or leave it out")
    if args.prune and args.step is not None:
        raise UserError(f"--step {args.step}: --prune goes by --keep and --keep-every alone; leave it out")
    if args.verify:
        yield from _verify(args.run_dir, args.step)
    elif args.show:
        yield from _show(*_find(args.run_dir, args.step))
    elif args.prune:
        yield from _prune(args.run_dir, 1 if args.keep is None else args.keep, args.keep_every or 0)
    elif args.convert:
        yield _convert(*_find(args.run_dir, args.step), args.convert, args.optimizer)
    else:
        yield from _list(args.run_dir)


def _find(run_dir: Path, step: int | None) -> tuple[Path, Manifest]:
    passed_over: list[str] = []
    directory, manifest = find_checkpoint(run_dir, step, passed_over.append)
    return directory, manifest


def _list(run_dir: Path) -> Iterator[str]:
    yield f"{'step':>10}  {'samples':>12}  {'raw tokens':>16}  {'MB':>10}  state"
    for directory in reversed(checkpoint_directories(run_dir)):
        try:
            manifest = peek_manifest(directory)
        except UserError as damage:
            yield f"{step_of(directory):>10}  {'':>12}  {'':>16}  {'':>10}  {damage}"
            continue
        size = sum(entry["bytes"] for entry in manifest.files.values()) / 1e6
        yield f"{manifest.step:>10}  {manifest.samples:>12,}  {manifest.raw_tokens:>16,}  {size:>10,.1f}  whole (by size)"


def _verify(run_dir: Path, step: int | None) -> Iterator[str]:
    directories = [d for d in reversed(checkpoint_directories(run_dir)) if step in (None, step_of(d))]
    if not directories:
        raise UserError(f"{run_dir}: holds no checkpoint{'' if step is None else f' of step {step}'}")
    damaged = 0
    for directory in directories:
        try:
            manifest = read_manifest(directory)
            tensors = TensorDirectory(directory)
            tensors.check_headers()
        except UserError as damage:
            damaged += 1
            yield f"{directory.name}: DAMAGED: {damage}"
            continue
        yield f"{directory.name}: whole, {len(manifest.files)} files, {len(tensors.shapes)} tensors"
    if damaged:
        raise UserError(f"{damaged} of {len(directories)} checkpoints are damaged; a resume passes over them")


def _show(directory: Path, manifest: Manifest) -> Iterator[str]:
    yield str(directory)
    plain = ("step", "samples", "next_sample", "raw_tokens", "world", "tokenizer_hash", "skipped", "quarantine", "stage")
    for name in (*plain, "versions"):
        yield f"  {name}: {json.dumps(getattr(manifest, name))}"
    for key, value in flatten(manifest.config).items():
        yield f"  config.{key}: {json.dumps(value)}"
    for name, entry in manifest.files.items():
        yield f"  {name}: {entry['bytes']:,} bytes, sha256 {entry['sha256'][:16]}"
    tensors = TensorDirectory(directory)
    weights = sum(math.prod(shape) for name, shape in tensors.shapes.items() if name.startswith("model."))
    yield f"  {len(tensors.shapes)} tensors, {weights:,} weights"
    for name, shape in sorted(tensors.shapes.items()):
        yield f"    {name} {list(shape)} {str(tensors.dtype(name)).removeprefix('torch.')}"


def _prune(run_dir: Path, keep: int, keep_every: int) -> Iterator[str]:
    if keep < 1 or keep_every < 0:
        raise UserError(f"--keep {keep} --keep-every {keep_every}: give --keep 1 or more, the newest whole checkpoint stays")
    whole = []
    for directory in checkpoint_directories(run_dir):
        try:
            read_manifest(directory)
            whole.append(directory)
        except UserError as damage:
            yield f"left alone, damaged: {damage}"
    for directory in superfluous(whole, keep, keep_every):
        remove_checkpoint(directory)
        yield f"removed {directory}"


def _convert(directory: Path, manifest: Manifest, output: Path, optimizer: bool) -> str:
    if output.exists():
        raise UserError(f"--convert {output}: exists; name a new file")
    tensors = TensorDirectory(directory)
    names = [n for n in sorted(tensors.shapes) if n.startswith("model.") or optimizer and not n.startswith("rng.")]
    chunks = [
        Chunk(n, (0,) * len(tensors.shapes[n]), tensors.shapes[n], tensors.dtype(n), lambda n=n: tensors.read(n)) for n in names
    ]
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        written = write_tensor_file(partial, chunks)
        write_atomically(output.with_name(f"{output.name}.json"), json.dumps({"step": manifest.step, **written}, indent=1))
        os.replace(partial, output)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"--convert {output}: cannot be written ({error.strerror})") from None
    return f"{output}: {len(names)} tensors of step {manifest.step}, {written['bytes']:,} bytes"
