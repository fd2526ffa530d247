"""How a run begins: its directory is checked, then it goes on from a checkpoint, from another run's weights, or afresh."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from unfold.model.config import LoraConfig, ModelConfig
from unfold.pretrain.checkpoint.manifest import (
    Manifest,
    agree_on_newest,
    checkpoint_directories,
    find_checkpoint,
    from_main,
    read_manifest,
    remove_leftovers,
    write_atomically,
)
from unfold.pretrain.checkpoint.merged import MergedTensors
from unfold.pretrain.checkpoint.state import RunningAverage, load_state
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.config import RunConfig, changes_on_resume, parse_saved, saved_settings
from unfold.pretrain.data.tokenizer import RunTokenizer, load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.safety.alive import HEARTBEATS, LOCK, STACKS
from unfold.pretrain.safety.faults import Quarantine, Rollback

LOCK_SECONDS = 15.0


def check_run_dir(run_dir: Path, config: RunConfig) -> list[str]:
    """Refuse a directory that is no run, and a configuration that would change what the run learns.

    Returns what train.allow_changes lets differ, as readable lines.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: is a file")
    saved = run_dir / "config.yaml"
    if not saved.exists():
        ours = (LOCK, HEARTBEATS, STACKS, "launch")  # a start that was killed before it wrote more; a job's script and log
        if run_dir.is_dir() and any(path.name not in ours for path in run_dir.iterdir()):
            raise UserError(f"--run-dir {run_dir}: is not empty and holds no run (no config.yaml); name another directory")
        return []
    old, notes = saved_settings(run_dir)
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(note, file=sys.stderr, flush=True)
    if not checkpoint_directories(run_dir):
        return []
    if old is None:
        raise UserError(f"{saved}: is damaged, and no checkpoint tells the run's settings; use a new run directory")
    changes = changes_on_resume(old, config.to_dict())
    if not changes:
        return []
    allowed = tuple(config.train.allow_changes)
    refused = [line for key, line in changes.items() if not any(key == a or key.startswith(f"{a}.") for a in allowed)]
    if refused:
        raise UserError(
            f"--run-dir {run_dir}: holds a run with other settings, which would change what is learned: {'; '.join(refused)}. "
            "Use the run's settings, name what may change in train.allow_changes, or use a new run directory"
        )
    return list(changes.values())


@contextlib.contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run directory's lock, which the system frees when the process ends, however it ends.

    Raises:
        UserError: another process holds it, also after a few seconds (ranks outlive a killed launcher by moments).
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / LOCK, "a+", encoding="utf-8", errors="replace") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(f"--run-dir {run_dir}: another process trains there ({file.read().strip()})") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def locked_on_all(run_dir: Path, parallel: Parallel) -> Iterator[None]:
    """The main rank holds the run directory's lock; all ranks hear when it cannot."""
    with contextlib.ExitStack() as held:
        refusal = [""]
        if parallel.is_main:
            try:
                held.enter_context(only_writer(run_dir))
            except UserError as error:
                refusal = [str(error)]
            except OSError as error:
                refusal = [f"--run-dir {run_dir}: cannot be written ({error.strerror})"]
        dist.broadcast_object_list(refusal, src=0)
        if refusal[0]:
            raise UserError(refusal[0])
        yield


def prepare_run_dir(run_dir: Path, config: RunConfig, tokenizer: RunTokenizer) -> None:
    """What the main rank writes before training."""
    if not (run_dir / "config.yaml").exists():  # a new run
        from unfold.pretrain.hf.exportable import export_objections  # loads transformers, which going on needs not

        for objection in export_objections(config.model, config.gist, tokenizer):
            print(f"note: this run could not be exported: {objection}", file=sys.stderr, flush=True)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    write_atomically(run_dir / "config.yaml", config.to_yaml())
    target = run_dir / "tokenizer"  # carried along: export and generation need no other directory
    if target.resolve() == tokenizer.directory.resolve() or _is_whole(target):
        return
    shutil.rmtree(target, ignore_errors=True)  # torn by a crash, or of a version that this one cannot read
    partial = target.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer.directory, partial)
    partial.rename(target)


def _is_whole(tokenizer: Path) -> bool:
    """Whether a run's copy of its tokenizer is there and can be read; whether it is the run's is asked elsewhere."""
    try:
        load_tokenizer(tokenizer, 0).tokenizer()
    except Exception:  # UserError, and what the tokenizers library raises
        return False
    return True


def load_newest(
    run_dir: Path,
    inputs_until: Callable[[Manifest], dict],
    quarantine: Quarantine,
    engine: deepspeed.DeepSpeedEngine,
    parallel: Parallel,
    say: Callable[[str], None],
    average: RunningAverage | None = None,
) -> Manifest | None:
    """Load the newest checkpoint that is whole and has not learned from quarantined samples; None when there is none.

    A collective. inputs_until: what decided the samples of a checkpoint, as the fields of its manifest that must be equal.
    """
    found = agree_on_newest(run_dir, parallel, quarantine.objection, say)
    if found is None:
        return None
    directory, manifest = found
    differing = [n for n, value in inputs_until(manifest).items() if getattr(manifest, n) != value]
    if differing:
        raise UserError(f"--run-dir {run_dir}: the run was made with another {' and '.join(differing)}; use a new run directory")
    tensors = TensorDirectory(directory)
    load_state(engine, parallel, tensors, weights_only=False, average=average)
    if manifest.world == parallel.world:  # another number of ranks has other generators; it begins with its seed
        _restore_random_states(tensors, parallel)
    return manifest


def _restore_random_states(tensors: TensorDirectory, parallel: Parallel) -> None:
    torch.set_rng_state(tensors.read(f"rng.{parallel.rank}.cpu"))
    name = f"rng.{parallel.rank}.cuda"
    if parallel.device.type == "cuda" and name in tensors.shapes:
        torch.cuda.set_rng_state(tensors.read(name), parallel.device)


def merged_quarantine(manifest: Manifest, quarantine: Quarantine) -> Quarantine:
    """The run's quarantine, also if its file was lost: a checkpoint holds what was in it."""
    theirs = [Rollback(**r) for r in manifest.quarantine]
    return Quarantine([*theirs, *(r for r in quarantine.rollbacks if r not in theirs)])


# Settings of a model that no tensor's shape tells; weights trained with one value are worthless with another.
STRUCTURE = ("heads", "kv_heads", "head_dim", "nope_layers", "norm_eps")
# May be changed on purpose, for longer sequences, and to give layers gists.
CHANGED = ("rope_theta", "rope_scaling", "layer_attention")


def warm_start(
    path: Path, tokenizer: RunTokenizer, model: ModelConfig, engine: deepspeed.DeepSpeedEngine, parallel: Parallel
) -> tuple[Path, str]:
    """Begin with the weights of the run or checkpoint directory ``path``. A collective.

    Returns the checkpoint's path, and what of the model differs from it, '' when nothing does.

    Raises:
        UserError: there is no whole checkpoint, or it is of another tokenizer or another model.
    """
    source, error, note, lora = from_main(parallel, lambda: _warm_start_source(path, tokenizer, model))
    if error:
        raise UserError(f"train.init_from: {error}")
    tensors = MergedTensors(source, model, lora) if lora.rank else TensorDirectory(source)
    load_state(engine, parallel, tensors, weights_only=True)
    return source, note


def _warm_start_source(path: Path, tokenizer: RunTokenizer, model: ModelConfig) -> tuple[Path, str, str, LoraConfig]:
    """The checkpoint, what speaks against it, what differs, and the adapters that it has."""
    none = LoraConfig()
    try:
        if (path / "checkpoints").is_dir():
            source, manifest = find_checkpoint(path, None, lambda text: None)
        else:
            source, manifest = path, read_manifest(path)
        saved = parse_saved(manifest.config, f"{source}/manifest.json").after(manifest.step)
    except UserError as error:
        return path, f"{path} is no whole checkpoint and holds none ({error})", "", none
    if manifest.tokenizer_hash != tokenizer.hash:
        return source, f"{path} was trained with another tokenizer, whose ids mean other tokens", "", none
    pairs = lambda names: ((name, getattr(saved.model, name), getattr(model, name)) for name in names)
    differing = lambda names: "; ".join(f"model.{n}: {a} there, {b} given" for n, a, b in pairs(names) if a != b)
    if wrong := differing(STRUCTURE):
        return source, f"{path} is of another model ({wrong}); take its settings", "", none
    return source, "", differing(CHANGED), saved.lora
