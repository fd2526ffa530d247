"""Steps that go wrong: which are noticed, what is rolled back, which samples are taken out.

Everything here is state of the run: it is saved with checkpoints and replayed on resume, so that a run remains a pure
function of its configuration, its data and its recorded faults.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unfold.pretrain.checkpoint.manifest import Manifest, checkpoint_directories, peek_manifest, write_atomically
from unfold.pretrain.errors import UserError

if TYPE_CHECKING:  # looking at a run needs no configuration machinery
    from unfold.pretrain.config import FaultConfig

QUARANTINE = "quarantine.json"
FAULTS = ("", "steps in a row without a finite loss and gradient", "loss spike")
TOO_MANY_SKIPS, SPIKE = 1, 2


@dataclass(frozen=True)
class Rollback:
    """One rollback.

    Attributes:
        step: the step that caused it (counted from 1).
        reason: in words.
        first, stop: global sample numbers that were taken out, stop exclusive.
    """

    step: int
    reason: str
    first: int
    stop: int


class Quarantine:
    """Global sample numbers that the run leaves out. The n-th sample trained on is the n-th number that is not in it."""

    def __init__(self, rollbacks: list[Rollback]):
        self.rollbacks = list(rollbacks)
        self.ranges: list[tuple[int, int]] = []  # disjoint and sorted
        for first, stop in sorted((r.first, r.stop) for r in rollbacks):
            if self.ranges and first <= self.ranges[-1][1]:
                first, stop = self.ranges[-1][0], max(stop, self.ranges.pop()[1])
            self.ranges.append((first, stop))

    def number(self, index: int) -> int:
        """The global sample number of the sample trained on as the index-th (from 0)."""
        for first, stop in self.ranges:
            if index < first:
                break
            index += stop - first
        return index

    def extended(self, rollback: Rollback) -> Quarantine:
        return Quarantine([*self.rollbacks, rollback])

    def to_list(self) -> list[dict]:
        return [asdict(r) for r in self.rollbacks]

    def objection(self, manifest: Manifest) -> str:
        """Why a checkpoint does not fit: it learned from samples that were taken out later. '' when it fits."""
        theirs = Quarantine([Rollback(**r) for r in manifest.quarantine])
        reached = theirs.number(manifest.samples - 1) + 1 if manifest.samples else 0
        before = lambda ranges: [r for r in ranges if r[0] < reached]
        if before(self.ranges) == before(theirs.ranges):
            return ""
        return f"learned from samples that {QUARANTINE} takes out"


def read_quarantine(run_dir: Path) -> Quarantine:
    """The run's quarantine list. A damaged one is told; what checkpoints hold of it remains, and each resume adds theirs."""
    path = run_dir / QUARANTINE
    if not path.exists():
        return Quarantine([])
    try:
        return Quarantine(_rollbacks(json.loads(path.read_text(encoding="utf-8"))["rollbacks"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error)
    for directory in checkpoint_directories(run_dir):
        try:
            found = _rollbacks(peek_manifest(directory).quarantine)
        except (UserError, ValueError, TypeError):
            continue
        _tell(f"{path}: is damaged ({reason}); taken from {directory.name}: {len(found)} rollback(s); later ones are lost")
        return Quarantine(found)
    _tell(f"{path}: is damaged ({reason}), and no checkpoint holds it; the run goes on without it")
    return Quarantine([])


def _rollbacks(entries: list[dict]) -> list[Rollback]:
    """Raises ValueError or TypeError for what are none."""
    found = [Rollback(**entry) for entry in entries]
    if not all(0 <= r.first < r.stop for r in found):
        raise ValueError("a range of samples is empty")
    return found


def _tell(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # all ranks read it; one tells
        print(text, file=sys.stderr, flush=True)


def write_quarantine(run_dir: Path, quarantine: Quarantine) -> None:
    write_atomically(run_dir / QUARANTINE, json.dumps({"rollbacks": quarantine.to_list()}, indent=1) + "\n")


class FaultGuard:
    """Judges every step. Rollbacks are due when it returns one of FAULTS' numbers."""

    def __init__(self, config: FaultConfig):
        self._config = config
        self.skipped: list[int] = []  # steps, counted from 1
        self.recent: deque[float] = deque(maxlen=config.spike_window)

    def restore(self, skipped: list[int], recent_losses: list[float]) -> None:
        """Go on from what a checkpoint holds."""
        self.skipped = list(skipped)
        self.recent = deque(recent_losses, maxlen=self._config.spike_window)

    def judge(self, step: int, loss: float, skipped: bool, begins_stage: bool = False) -> int:
        """Take note of a step (counted from 1); returns its fault, 0 for none that needs a rollback.

        begins_stage: losses before it were of other samples or settings, and tell nothing of its own.
        """
        if begins_stage:
            self.recent.clear()
        if skipped:
            self.skipped.append(step)
            limit = self._config.max_skips
            return TOO_MANY_SKIPS if self.skipped[-limit:] == list(range(step - limit + 1, step + 1)) else 0
        if self._is_spike(loss):
            return SPIKE
        self.recent.append(loss)
        return 0

    def _is_spike(self, loss: float) -> bool:
        if not self._config.spike_z or len(self.recent) < self._config.spike_window:
            return False
        return robust_z(loss, self.recent) > self._config.spike_z

    def guilty_steps(self, fault: int, step: int) -> tuple[int, int]:
        """First and last step (counted from 1) whose samples a fault at ``step`` condemns."""
        count = self._config.max_skips if fault == TOO_MANY_SKIPS else self._config.spike_steps
        return max(1, step - count + 1), step


def robust_z(value: float, sample: deque[float] | list[float]) -> float:
    """Distance from the median in robust standard deviations (1.4826 x median absolute deviation)."""
    median = statistics.median(sample)
    spread = 1.4826 * statistics.median(abs(x - median) for x in sample)
    return (value - median) / max(spread, 1e-6 * max(1.0, abs(median)))


def finite_or_none(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return value if math.isfinite(value) else None
