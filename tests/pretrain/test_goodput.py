"""The ledger of what a run's time went to, over starts, rollbacks and losses."""

from __future__ import annotations

import json
import time

import pytest

from unfold.pretrain.monitor.goodput import Goodput
from unfold.pretrain.monitor.ledger import PARTS, read_ledger


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved: clock(seconds)."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def run_steps(goodput, clock, first, last, run_dir=None):
    for step in range(first, last + 1):
        clock(2.5)  # half a second of it between the steps
        goodput.step(step, 2.0, 0.25)
        if run_dir:
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "seconds": 2.0, "data_wait_s": 0.25}) + "\n")


def test_every_second_is_told_once(tmp_path, clock):
    goodput = Goodput(tmp_path, 990.0)
    goodput.begin(0)
    goodput.aside("startup")
    run_steps(goodput, clock, 1, 4)
    clock(3)
    goodput.aside("validation")
    goodput.write()
    ledger = read_ledger(tmp_path)
    assert set(ledger["spent"]) == set(PARTS)
    found = {part: seconds for part, seconds in ledger["spent"].items() if seconds}
    assert found == {"startup": 10, "training": 7, "data": 1, "other": 2, "validation": 3}
    assert sum(found.values()) == ledger["seen"] - ledger["began"]


def test_a_rollback_makes_training_lost(tmp_path, clock):
    goodput = Goodput(tmp_path, 1000.0)
    goodput.begin(0)
    run_steps(goodput, clock, 1, 6)
    clock(4)
    goodput.begin(4)
    goodput.aside("rollback")
    run_steps(goodput, clock, 5, 5)
    goodput.write()
    spent = read_ledger(tmp_path)["spent"]
    assert (spent["training"], spent["lost"], spent["rollback"]) == (5 * 1.75, 2 * 1.75, 4)


def test_over_starts_what_was_not_saved_is_lost_and_what_lay_between_is_down(tmp_path, clock):
    goodput = Goodput(tmp_path, 1000.0)
    goodput.begin(0)
    run_steps(goodput, clock, 1, 6, tmp_path)
    goodput.write()  # and killed; saved was step 4
    clock(100)
    again = Goodput(tmp_path, 1065.0)
    again.begin(4)
    again.aside("startup")
    run_steps(again, clock, 5, 6)
    again.write()
    ledger = read_ledger(tmp_path)
    spent = ledger["spent"]
    assert ledger["starts"] == 2
    assert (spent["down"], spent["startup"]) == (50, 50)
    assert (spent["training"], spent["lost"]) == (6 * 1.75, 2 * 1.75)
    assert sum(spent.values()) == ledger["seen"] - ledger["began"]
