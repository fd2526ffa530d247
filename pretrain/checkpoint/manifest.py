"""Checkpoints: directories of sharded safetensors with a manifest that is written last.

    checkpoints/step-00000100/   shard-00001-model-00001-of-00003.safetensors ..  manifest.json

A directory is made under a hidden name and renamed when it is whole (checkpoint/save.py), so one without a manifest does
not count as a checkpoint, and one whose files differ from its manifest is passed over for the newest older whole one.
Nothing in it is pickled: tensors are safetensors, everything else is JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from unfold.pretrain.errors import UserError

if TYPE_CHECKING:  # listing checkpoints needs none of the heavy libraries behind it
    from unfold.pretrain.parallel import Parallel

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: steps done, skipped ones included.
        samples: samples trained on.
        next_sample: the global sample number that the next step begins with.
        raw_tokens: raw tokens seen.
        config: the resolved configuration.
        tokenizer_hash, data: identify the tokenizer and the training shards.
        versions: of the libraries that wrote it.
        world: number of ranks that wrote it.
        skipped: steps whose update was skipped.
        recent_losses: what a loss spike is measured against.
        quarantine: rollbacks so far, each with the samples that it took out (unfold.pretrain.safety.faults.Quarantine).
        files: {name: {"bytes", "sha256"}} of every other file of the directory.
        stage: of a run with stages, that of the last step: its number and name, and the settings of the model that stages change.
    """

    step: int
    samples: int
    next_sample: int
    raw_tokens: int
    config: dict
    tokenizer_hash: str
    data: list[str]
    versions: dict[str, str]
    world: int
    skipped: list[int]
    recent_losses: list[float]
    quarantine: list[dict]
    files: dict[str, dict] = field(default_factory=dict)
    format: int = FORMAT
    stage: dict = field(default_factory=dict)


_KINDS = {name: {"int": int, "str": str, "dict": dict, "list": list}[kind.partition("[")[0]]
          for name, kind in Manifest.__annotations__.items()}  # fmt: skip


def checkpoint_directories(run_dir: Path) -> list[Path]:
    """Checkpoint directories of a run, newest first, whole or not."""
    return sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(directory: Path) -> int:
    """The step in a checkpoint directory's name; -1 when there is none."""
    digits = directory.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def peek_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there in full size; contents are not read.

    Raises:
        UserError: the manifest is missing, damaged or of another format, or a file is missing or cut short; names it.
    """
    path = directory / MANIFEST
    try:
        tree = json.loads(path.read_text())
        written = tree["format"]
        manifest = Manifest(**tree) if written == FORMAT else None
        if manifest and (wrong := [name for name, kind in _KINDS.items() if not isinstance(getattr(manifest, name), kind)]):
            raise ValueError(f"{', '.join(wrong)} of another type")
        files = {name: (expected["bytes"], expected["sha256"]) for name, expected in tree["files"].items()}  # both are there
        sizes = {name: size for name, (size, _) in files.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: has no {MANIFEST}, it was not finished") from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise UserError(f"{path}: is damaged ({error})") from None
    if manifest is None:
        raise UserError(f"{path}: is of format {written}, this version reads format {FORMAT}")
    for name, size in sizes.items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"{file}: is missing")
        if file.stat().st_size != size:
            raise UserError(f"{file}: has {file.stat().st_size} bytes, {size} were written")
    return manifest


def check_contents(directory: Path, manifest: Manifest, names: list[str]) -> None:
    """Raises UserError, naming the first file whose content is not what was written."""
    for name in names:
        try:
            differs = sha256(directory / name) != manifest.files[name]["sha256"]
        except OSError as error:
            raise UserError(f"{directory / name}: cannot be read ({error.strerror})") from None
        if differs:
            raise UserError(f"{directory / name}: its content differs from what was written (sha256)")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as it says. Raises UserError naming what is not."""
    manifest = peek_manifest(directory)
    check_contents(directory, manifest, list(manifest.files))
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


def agree_on_newest(
    run_dir: Path, parallel: Parallel, usable: Callable[[Manifest], str], say: Callable[[str], None]
) -> tuple[Path, Manifest] | None:
    """Like :func:`newest_whole` for all ranks at once: one decides, all share the work of hashing. A collective.

    usable: says why a whole checkpoint cannot be used, '' when it can.
    """
    import torch.distributed as dist  # late: looking at checkpoints needs no PyTorch

    directories = from_main(parallel, lambda: checkpoint_directories(run_dir))
    for directory in directories:
        manifest, defect = from_main(parallel, lambda: _peek(directory, usable))  # noqa: B023 (called at once)
        if not defect:
            mine = sorted(manifest.files)[parallel.rank :: parallel.world]
            defects = [""] * parallel.world
            dist.all_gather_object(defects, _defect(lambda: check_contents(directory, manifest, mine)))  # noqa: B023
            defect = next(filter(None, defects), "")
        if not defect:
            return directory, manifest
        say(f"checkpoint passed over: {defect}")
    return None


def _peek(directory: Path, usable: Callable[[Manifest], str]) -> tuple[Manifest | None, str]:
    try:
        manifest = peek_manifest(directory)
    except UserError as damage:
        return None, str(damage)
    reason = usable(manifest)
    return manifest, f"{directory}: {reason}" if reason else ""


def _defect(check: Callable[[], None]) -> str:
    try:
        check()
    except UserError as damage:
        return str(damage)
    return ""


def from_main(parallel: Parallel, make: Callable):
    """What the main rank makes, on every rank."""
    import torch.distributed as dist

    box = [make() if parallel.is_main else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def find_checkpoint(run_dir: Path, step: int | None, say: Callable[[str], None]) -> tuple[Path, Manifest]:
    """A given step's checkpoint, or the newest whole one. Raises UserError when there is none."""
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"--run-dir {run_dir}: is not a run directory (it has no checkpoints/)")
    if step is not None:
        directory = run_dir / "checkpoints" / checkpoint_name(step)
        if not directory.is_dir():
            there = ", ".join(str(step_of(d)) for d in checkpoint_directories(run_dir)) or "none"
            raise UserError(f"--step {step}: {run_dir} has no such checkpoint; it has steps {there}")
        return directory, read_manifest(directory)
    found = newest_whole(run_dir, say)
    if found is None:
        raise UserError(f"--run-dir {run_dir}: holds no whole checkpoint")
    return found


def superfluous(directories: list[Path], keep: int, keep_every: int) -> list[Path]:
    """Of checkpoint directories, newest first, those that neither rule keeps.

    keep: newest ones that stay, 0 for all. keep_every: multiples of so many steps stay, 0 for none.
    """
    older = directories[keep:] if keep else []
    return [d for d in older if not (keep_every and step_of(d) % keep_every == 0)]


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves nothing that looks like one.

    It may have been removed by another process, or be read by one, on whose account a network file system keeps files: what is
    left of it is hidden, and removed when the run starts next.
    """
    hidden = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(directory, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed processes left half written or half removed. Only while nothing is being saved."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_directory(path: Path) -> None:
    """Make what was created or renamed in a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
