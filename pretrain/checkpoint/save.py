"""Saving: training waits while the state is copied, not while it is written.

Each rank writes its own files, in a thread, and reports size and hash through the store that the ranks were started
with; the main rank's thread waits for all reports, writes the manifest and renames the directory. There is no collective
in it: a rank that is late or gone can fail the save but not hang it, and the run goes on with its older checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from unfold.pretrain.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    checkpoint_directories,
    checkpoint_name,
    remove_checkpoint,
    step_of,
    superfluous,
    sync_directory,
    write_atomically,
)
from unfold.pretrain.checkpoint.state import ADAM_STEP, RunningAverage, adam_step, fragments
from unfold.pretrain.checkpoint.tensors import INDEX, Chunk, index_entries, write_index, write_tensor_file
from unfold.pretrain.config import CheckpointConfig
from unfold.pretrain.parallel import Parallel

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0  # beyond its deadline, until a save is given up that hangs in a write of the main rank's own
LEAST_FILES = 3  # of a rank: a run of a matrix's elements is up to three rectangles


@dataclass(frozen=True)
class SaveResult:
    """How a save ended; the main rank's word counts.

    Attributes:
        step: of the checkpoint.
        seconds: from the beginning of the copy to the end.
        pause: seconds of it that training waited.
        error: '' when the checkpoint is whole.
    """

    step: int
    seconds: float
    pause: float
    error: str


class SaveError(Exception):
    """A save failed; the message says where and why."""


class _Staging:
    """This rank's part of the state, copied into host memory that is allocated once and used by every save."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, parallel: Parallel, average: RunningAverage):
        self._engine, self._parallel = engine, parallel
        self._fragments = [f for f in fragments(engine, parallel, average) if f.writes]
        pinned = parallel.device.type == "cuda"
        # Zeros rather than empty: the pages are mapped now, not in the first save's pause.
        self._buffer = torch.zeros(sum(f.values.numel() for f in self._fragments), pin_memory=pinned)
        self._small: list[Chunk] = []

    def copy(self) -> None:
        begin = 0
        for fragment in self._fragments:
            end = begin + fragment.values.numel()
            fragment.copy_to(self._buffer[begin:end])
            begin = end
        small = random_states(self._parallel)
        if self._parallel.is_main:
            small[ADAM_STEP] = adam_step(self._engine)
        self._small = [_small_chunk(name, value) for name, value in small.items()]
        if self._parallel.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def files(self) -> dict[str, list[Chunk]]:
        """What was copied as {file name: chunks}; empty files are left out. A file holds one rectangle of a tensor at most."""
        parts: list[list[Chunk]] = [list(self._small), *([] for _ in range(LEAST_FILES - 1))]
        begin, seen = 0, Counter()
        for fragment in self._fragments:
            values = self._buffer[begin : begin + fragment.values.numel()]
            begin += fragment.values.numel()
            chunk = Chunk(fragment.name, fragment.offsets, fragment.shape, torch.float32, lambda values=values: values)
            which = seen[fragment.name]
            seen[fragment.name] += 1
            if which == len(parts):
                parts.append([])
            parts[which].append(chunk)
        rank = self._parallel.rank
        names = [f"shard-{rank + 1:05d}-model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        return {name: chunks for name, chunks in zip(names, parts) if chunks}


def _small_chunk(name: str, value: torch.Tensor) -> Chunk:
    return Chunk(name, (0,) * value.dim(), tuple(value.shape), value.dtype, lambda: value)


def random_states(parallel: Parallel) -> dict[str, torch.Tensor]:
    """States of this rank's random generators, uint8 [n], by checkpoint name."""
    states = {f"rng.{parallel.rank}.cpu": torch.get_rng_state()}
    if parallel.device.type == "cuda":
        states[f"rng.{parallel.rank}.cuda"] = torch.cuda.get_rng_state(parallel.device)
    return states


class Saver:
    """Saves a run's state, one save at a time."""

    def __init__(
        self,
        run_dir: Path,
        engine: deepspeed.DeepSpeedEngine,
        parallel: Parallel,
        config: CheckpointConfig,
        before_commit: Callable[[], str],
        average: RunningAverage,
        in_use: Callable[[], set[int]],
    ):
        """before_commit: asked on the main rank before a checkpoint counts; says what speaks against it, or ''.

        average: of the weights, saved too. in_use: steps whose checkpoints are being read and stay.
        """
        self._run_dir, self._parallel, self._config, self._before_commit = run_dir, parallel, config, before_commit
        self._in_use = in_use
        self._staging = _Staging(engine, parallel, average)
        self._store = dist.distributed_c10d._get_default_store()
        self._thread: threading.Thread | None = None
        self._save: tuple[Manifest, float, float] | None = None  # that was copied last
        self._writing: tuple[Manifest, float, float] | None = None  # that the thread writes
        self._results: list[SaveResult] = []
        self._number = 0  # of the save within this process: names its keys and its directory
        self._given_up = False  # whether the main rank's own save was reported as failed while it still hangs

    def copy(self, manifest: Manifest) -> float:
        """Copy the state aside, after the save before is done; returns the seconds that training waited."""
        began = time.monotonic()
        self.wait()
        self._number += 1
        if self._thread is None:  # else the one before hangs in a write, and this save is reported as failed
            self._staging.copy()
        pause = time.monotonic() - began
        self._save = (manifest, began, pause)
        return pause

    def start(self) -> None:
        """Write what was copied: in the background if so configured."""
        number, (manifest, began, pause) = self._number, self._save
        if self._thread is not None:
            error = "the save before hangs in a write"
            self._report(number, {"error": error})
            if self._parallel.is_main:  # there is no thread to hear of it
                self._results.append(SaveResult(manifest.step, time.monotonic() - began, pause, error))
            return
        self._writing, self._given_up = self._save, False
        work = lambda: self._write(number, manifest, began, pause)
        self._thread = threading.Thread(target=work, daemon=True, name="save")
        self._thread.start()
        if not self._config.background:
            self.wait()

    def poll(self) -> list[SaveResult]:
        """Results of saves that ended since the last call; on the main rank only."""
        results = []
        while self._results:
            results.append(self._results.pop(0))
        return results

    def wait(self) -> None:
        """Wait until the save under way has ended, at most a little over its deadline."""
        if self._thread is None:
            return
        manifest, began, pause = self._writing
        limit = 60 * self._config.deadline_minutes
        self._thread.join(max(0.0, began + limit - time.monotonic()) + GRACE_SECONDS)
        if not self._thread.is_alive():
            self._thread = None
        elif self._parallel.is_main and not self._given_up:
            self._given_up = True
            error = f"rank 0 hangs in a write after checkpoint.deadline_minutes = {self._config.deadline_minutes:g}"
            self._results.append(SaveResult(manifest.step, time.monotonic() - began, pause, error))

    def _write(self, number: int, manifest: Manifest, began: float, pause: float) -> None:
        """The thread: this rank's files; on the main rank also the checkpoint as a whole."""
        final = self._run_dir / "checkpoints" / checkpoint_name(manifest.step)
        partial = final.with_name(f".{final.name}.{number}.partial")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            chunks = self._staging.files()
            files = {name: write_tensor_file(partial / name, of_file) for name, of_file in chunks.items()}
            index = {name: index_entries(of_file) for name, of_file in chunks.items()}
            self._report(number, {"files": files, "index": index})
        except Exception as error:  # whatever it is, the run must live and the main rank must hear of it
            self._report(number, {"error": _reason(error)})
        if not self._parallel.is_main:
            return
        error = ""
        try:
            files, index = self._collect(number, began)
            files[INDEX] = write_index(partial, index)
            self._commit(number, replace(manifest, files=files), partial, final)
        except Exception as failure:
            error = _reason(failure)
            shutil.rmtree(partial, ignore_errors=True)
        self._results.append(SaveResult(manifest.step, time.monotonic() - began, pause, error))

    def _key(self, number: int, rank: int) -> str:
        return f"unfold/save/{number}/{rank}"

    def _report(self, number: int, report: dict) -> None:
        self._store.set(self._key(number, self._parallel.rank), json.dumps(report))

    def _collect(self, number: int, began: float) -> tuple[dict[str, dict], dict[str, dict]]:
        """Every rank's files and what is in them, as soon as all have reported. Raises SaveError naming ranks that failed or are
        late."""
        missing, files, index = set(range(self._parallel.world)), {}, {}
        while missing:
            for rank in sorted(missing):
                key = self._key(number, rank)
                if not self._store.check([key]):
                    continue
                report = json.loads(self._store.get(key))
                self._store.delete_key(key)
                if "error" in report:
                    raise SaveError(f"rank {rank}: {report['error']}")
                files.update(report["files"])
                index.update(report["index"])
                missing.discard(rank)
            if missing and time.monotonic() - began > 60 * self._config.deadline_minutes:
                late = ", ".join(map(str, sorted(missing)))
                raise SaveError(f"rank {late} not done after checkpoint.deadline_minutes = {self._config.deadline_minutes:g}")
            if missing:
                time.sleep(POLL_SECONDS)
        return files, index

    def _commit(self, number: int, manifest: Manifest, partial: Path, final: Path) -> None:
        if objection := self._before_commit():
            raise SaveError(objection)
        write_atomically(partial / MANIFEST, json.dumps(asdict(manifest), indent=1))
        sync_directory(partial)
        if final.exists():  # damaged, or of a stretch that was rolled back: it was not resumed from
            remove_checkpoint(final)
        os.rename(partial, final)
        sync_directory(final.parent)
        # Newer ones are damaged or rolled back; counting them would push out the good ones.
        mine = [d for d in checkpoint_directories(self._run_dir) if step_of(d) <= manifest.step]
        read = self._in_use()
        for old in superfluous(mine, self._config.keep, self._config.keep_every):
            if step_of(old) not in read:  # a later save removes it
                remove_checkpoint(old)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'writing'}: {error.strerror or error}"
    return str(error) if isinstance(error, SaveError) else f"{type(error).__name__}: {error}"
