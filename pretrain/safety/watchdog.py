"""Ranks that do not get on: heartbeats, a watchdog that ends a hanging job with all stacks, and who is slow."""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

import torch.distributed as dist

from unfold.pretrain.parallel import Parallel
from unfold.pretrain.safety.alive import HEARTBEAT_SECONDS, HEARTBEATS, STACKS
from unfold.pretrain.safety.flight import write_collectives

EXIT_CODE = 70  # of a process that its watchdog ended
SECONDS_FOR_OTHERS = 3.0  # between a rank's stacks and its end, so that the other ranks can write theirs
POLL_SECONDS = 0.5  # between looks at the launcher and the clock
STRAGGLER_STEPS = 20  # that a rank's time is averaged over


class Watchdog:
    """Watches one rank's progress from a thread.

    ``heartbeat/rank-N.json`` tells when the rank last gave a sign of life and when it last got on. When nothing gets on for
    the limit, the rank writes the stacks of all its threads to stderr and ``stacks/rank-N.txt``, says which ranks are
    behind, and ends; the launcher then ends the others. A rank whose launcher was killed ends too: torchrun's ranks would
    outlive it, and write into the run directory beside those of a restart.
    """

    def __init__(self, run_dir: Path, parallel: Parallel, limit_seconds: float):
        """limit_seconds: 0 watches nothing and only keeps the heartbeat."""
        self._run_dir, self._rank, self._world, self._limit = run_dir, parallel.rank, parallel.world, limit_seconds
        self._every = min(HEARTBEAT_SECONDS, limit_seconds / 10) if limit_seconds else HEARTBEAT_SECONDS
        self._last, self._step, self._phase = time.time(), 0, "start"
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def beat(self, step: int, phase: str) -> None:
        """The rank got on: it now begins this phase of this step."""
        self._last, self._step, self._phase = time.time(), step, phase

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()

    def _file(self, rank: int) -> Path:
        return self._run_dir / HEARTBEATS / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        next_sign = 0.0
        while not self._end.is_set():
            if self._launcher not in (None, os.getppid()):
                self._leave_orphaned()
            if time.time() >= next_sign:
                next_sign = time.time() + self._every
                self._write_heartbeat()
            if self._limit and time.time() - self._last > self._limit:
                self._give_up()
            self._end.wait(min(POLL_SECONDS, self._every))
        self._write_heartbeat()

    def _leave_orphaned(self) -> None:
        try:
            print(f"error: rank {self._rank}: the launcher is gone; the rank ends", file=sys.stderr, flush=True)
        except OSError:  # its pipe is gone too
            pass
        os._exit(EXIT_CODE)

    def _write_heartbeat(self) -> None:
        state = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "step": self._step,
                 "phase": self._phase, "progress": self._last, "alive": time.time()}  # fmt: skip
        path = self._file(self._rank)
        temporary = path.with_suffix(".tmp")
        try:  # a full disk or a slow server must not end a run for want of a heartbeat
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(state))
            os.replace(temporary, path)
        except OSError:
            pass

    def _give_up(self) -> None:
        silence = time.time() - self._last
        where = f"in step {self._step} ({self._phase})"
        behind = "; ".join(self._behind()) or "no rank is behind the others"
        text = f"error: rank {self._rank}: hangs for {silence:.0f} s {where}; {behind}; all stacks follow, the job ends"
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if recorded := write_collectives(self._rank, self._run_dir):
            print(f"the last collectives of rank {self._rank}: {recorded}", file=sys.stderr, flush=True)
        try:
            stacks = self._run_dir / STACKS / f"rank-{self._rank:05d}.txt"
            stacks.parent.mkdir(parents=True, exist_ok=True)
            with open(stacks, "w") as file:
                file.write(text + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError:
            pass
        time.sleep(SECONDS_FOR_OTHERS)
        os._exit(EXIT_CODE)

    def _behind(self) -> list[str]:
        """Ranks that give no sign of life or are at an earlier step than the furthest."""
        states = []
        for rank in range(self._world):
            try:
                beat = json.loads(self._file(rank).read_text())
                states.append({name: beat[name] for name in ("rank", "host", "pid", "step", "phase", "alive")})
            except (OSError, ValueError, KeyError, TypeError):  # being replaced, or of another version
                continue
        furthest = max((s["step"] for s in states), default=0)
        lines = []
        for s in states:
            who = f"rank {s['rank']} (host {s['host']}, pid {s['pid']})"
            silent = time.time() - s["alive"]
            if silent > 3 * self._every + 1:
                lines.append(f"{who} gives no sign of life since {silent:.0f} s")
            elif s["step"] < furthest:
                lines.append(f"{who} is still in step {s['step']} ({s['phase']})")
        return lines


def limit_groups(seconds: float) -> None:
    """Give every process group the run's timeout: groups made by new_group do not inherit that of the first one."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


class Stragglers:
    """Finds ranks that are busy longer than the others, averaged over some steps."""

    def __init__(self, factor: float):
        self._factor, self._recent = factor, deque(maxlen=STRAGGLER_STEPS)

    def add(self, busy: list[float]) -> list[int]:
        """Note each rank's busy seconds of a step; returns the stragglers of the last steps."""
        self._recent.append(busy)
        if len(busy) < 2 or len(self._recent) < STRAGGLER_STEPS:
            return []
        means = [statistics.fmean(rank) for rank in zip(*self._recent)]
        usual = statistics.median_low(means)
        return [rank for rank, mean in enumerate(means) if mean > self._factor * usual]
