"""What makes a run save or stop out of turn, and how all ranks agree on it at a step boundary."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from unfold.pretrain.parallel import Parallel

STOPS = ("", "SIGTERM", "SIGUSR1", "the time limit (checkpoint.stop_after_minutes)")
TIME_LIMIT = 3  # the last of them
REQUEST = "SAVE"  # a file of this name in the run directory asks for a checkpoint


class Signals:
    """Takes SIGTERM and SIGUSR1 as wishes to save and stop, for as long as the ``with`` block lasts.

    The second signal of a kind does what it does to any program, for people who cannot wait.
    """

    def __init__(self):
        self.received = 0  # index into STOPS
        self._before = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._take)
        return self

    def _take(self, number: int, frame) -> None:
        self.received = STOPS.index(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def process_seconds() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def time_is_up(minutes: float) -> bool:
    return 0 < minutes <= process_seconds() / 60


def take_request(run_dir: Path) -> bool:
    """Whether a checkpoint was asked for; answers each request once."""
    try:
        (run_dir / REQUEST).unlink()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Boundary:
    """What the ranks agreed on at the end of a step; the same on all of them.

    Attributes:
        stop: why the run is to save and stop, '' to go on.
        save: whether a checkpoint was asked for.
        fault: number of the worst fault that a rank saw, 0 for none.
        busy: seconds that each rank was busy with its own work in this step.
        usage: what each rank used in it, the numbers of its :class:`unfold.pretrain.monitor.throughput.RankUsage`.
    """

    stop: str
    save: bool
    fault: int
    busy: list[float]
    usage: list[list[float]]


def agree(parallel: Parallel, stop: int, save: bool, fault: int, busy: float, usage: Sequence[float]) -> Boundary:
    """Exchange what each rank has to say. One small collective per step, so that no rank acts alone."""
    mine = torch.tensor([stop, save, fault, busy, *usage], dtype=torch.float64, device=parallel.device)
    everyone = torch.empty(parallel.world * len(mine), dtype=torch.float64, device=parallel.device)
    dist.all_gather_into_tensor(everyone, mine)
    rows = everyone.view(parallel.world, len(mine)).tolist()
    stops, saves, faults, busy_of = zip(*(row[:4] for row in rows))
    return Boundary(STOPS[int(max(stops))], any(saves), int(max(faults)), list(busy_of), [row[4:] for row in rows])
