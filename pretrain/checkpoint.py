"""Checkpoints: torch.distributed.checkpoint directories with a manifest that is written last.

    checkpoints/step-00000100/   __R_0.distcp ..  .metadata  manifest.json

A directory is made under a hidden name and renamed when it is whole, so one without a manifest does not count as a
checkpoint, and one whose files differ from its manifest is passed over for the newest older whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pretrain.engine_state import empty_state, read_state, write_state
from pretrain.errors import UserError
from pretrain.parallel import Parallel

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps done.
        samples: global sample numbers consumed; the next is this one.
        raw_tokens: raw tokens seen.
        config: the resolved configuration.
        tokenizer_hash, data: identify the tokenizer and the training shards.
        versions: of the libraries that wrote it.
        files: {name: {"bytes", "sha256"}} of every other file of the directory.
    """

    step: int
    samples: int
    raw_tokens: int
    config: dict
    tokenizer_hash: str
    data: list[str]
    versions: dict[str, str]
    files: dict[str, dict] = field(default_factory=dict)
    format: int = FORMAT


def checkpoint_directories(run_dir: Path) -> list[Path]:
    """Checkpoint directories of a run, newest first, whole or not."""
    return sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as it says.

    Raises:
        UserError: the manifest is missing or damaged, or a file is missing, cut short or altered; names it.
    """
    try:
        manifest = Manifest(**json.loads((directory / MANIFEST).read_text()))
    except FileNotFoundError:
        raise UserError(f"{directory}: has no {MANIFEST}, it was not finished") from None
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{directory}/{MANIFEST}: is damaged ({error})") from None
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path}: is missing")
        if path.stat().st_size != expected["bytes"]:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, {expected['bytes']} were written")
        if _sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: its content differs from what was written (sha256)")
    return manifest


def newest_whole(run_dir: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint of a run and its manifest; says which damaged ones were passed over."""
    for directory in checkpoint_directories(run_dir):
        try:
            manifest = read_manifest(directory)
        except UserError as damage:
            say(f"checkpoint passed over: {damage}")
            continue
        return directory, manifest
    return None


def find_checkpoint(run_dir: Path, step: int | None, say: Callable[[str], None]) -> tuple[Path, Manifest]:
    """A given step's checkpoint, or the newest whole one. Raises UserError when there is none."""
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"--run-dir {run_dir}: is not a run directory (it has no checkpoints/)")
    if step is not None:
        directory = run_dir / "checkpoints" / _name(step)
        if not directory.is_dir():
            there = ", ".join(str(int(d.name[5:])) for d in checkpoint_directories(run_dir)) or "none"
            raise UserError(f"--step {step}: {run_dir} has no such checkpoint; it has steps {there}")
        return directory, read_manifest(directory)
    found = newest_whole(run_dir, say)
    if found is None:
        raise UserError(f"--run-dir {run_dir}: holds no whole checkpoint")
    return found


def save_checkpoint(run_dir: Path, engine, parallel: Parallel, manifest: Manifest, keep: int) -> Path:
    """Write a checkpoint. A collective; returns when it is whole on disk.

    keep: newest checkpoints that stay, 0 for all.
    """
    final = run_dir / "checkpoints" / _name(manifest.step)
    partial = final.with_name(f".{final.name}.partial")
    if parallel.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(read_state(engine, parallel.tensor_mesh), checkpoint_id=str(partial))
    if parallel.is_main:
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(partial.iterdir())}
        write_atomically(partial / MANIFEST, json.dumps(asdict(manifest) | {"files": files}, indent=1))
        shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one: a whole one would have been resumed from
        os.rename(partial, final)
        if keep:
            for old in checkpoint_directories(run_dir)[keep:]:
                shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(directory: Path, engine, parallel: Parallel) -> None:
    """Read weights and optimizer state into the engine, from any layout into any. A collective."""
    state = empty_state(engine, parallel.tensor_mesh)
    dcp.load(state, checkpoint_id=str(directory))
    write_state(engine, state)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
