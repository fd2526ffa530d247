"""Goodput: the share of wall time, over all starts of a run, in which it learned something that lasted; and what took the rest.

``goodput.json`` in the run directory holds what the seconds since the first start went to; the main rank writes it every few
seconds. A start counts from the beginning of its process; what lies between the last sign of one start and the next is
``down``, and steps that a crash or a rollback made worthless move from ``training`` to ``lost``.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path

from unfold.pretrain.checkpoint.manifest import write_atomically
from unfold.pretrain.monitor.ledger import LEDGER, PARTS, read_ledger
from unfold.pretrain.monitor.metrics import read_metrics

SECONDS_BETWEEN = 10.0  # two writings
REMEMBERED = 100_000  # last steps whose times are known when they turn out to be lost


class Goodput:
    """Keeps the ledger of a run; on the main rank only."""

    def __init__(self, run_dir: Path, began: float, now: float | None = None):
        """began: when this process began, seconds since the epoch."""
        self._path, self._written = run_dir / LEDGER, 0.0
        ledger = read_ledger(run_dir)
        self._first = ledger["began"] if ledger else began
        self._starts = (ledger["starts"] if ledger else 0) + 1
        self._spent = dict.fromkeys(PARTS, 0.0) | (ledger["spent"] if ledger else {})
        self._spent["down"] += max(0.0, began - ledger["seen"]) if ledger else 0.0
        self._mark = began  # up to here everything is told
        metrics = run_dir / "metrics.jsonl"
        lines = read_metrics(metrics)[-REMEMBERED:] if ledger and metrics.exists() else []
        self._steps = deque(((m["step"], m["seconds"] - m.get("data_wait_s", 0.0)) for m in lines if "seconds" in m), REMEMBERED)

    def begin(self, done: int) -> None:
        """Training begins after ``done`` steps: at the start, or after a rollback. What was done beyond is lost."""
        lost = 0.0
        while self._steps and self._steps[-1][0] > done:
            lost += self._steps.pop()[1]
        lost = min(lost, self._spent["training"])
        self._spent["training"] -= lost
        self._spent["lost"] += lost

    def step(self, step: int, seconds: float, data_wait: float) -> None:
        """A step took ``seconds``, of which training waited for data so long."""
        self._steps.append((step, seconds - data_wait))
        self._spent["training"] += seconds - data_wait
        self._spent["data"] += data_wait
        self._rest("other", seconds)

    def aside(self, part: str) -> None:
        """Everything since the last word was spent on this."""
        self._rest(part if part in PARTS else "other")

    def _rest(self, part: str, told: float = 0.0) -> None:
        now = time.time()
        self._spent[part] += max(0.0, now - self._mark - told)
        self._mark = now
        if now - self._written > SECONDS_BETWEEN:
            self.write()

    def write(self) -> None:
        """Bring the ledger up to date."""
        self._written = time.time()
        ledger = {"began": self._first, "seen": self._mark, "starts": self._starts, "spent": self._spent}
        try:
            write_atomically(self._path, json.dumps(ledger))
        except OSError:  # a full disk must not end a run for want of it
            pass
