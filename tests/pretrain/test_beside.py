"""Evaluation and export beside a run: when they begin, what becomes of their results and failures; with stand-ins."""

from __future__ import annotations

import json

import pytest

from unfold.model.settings import SettingsError
from unfold.pretrain.config import EvaluationConfig
from unfold.pretrain.monitor.metrics import MetricsFile, read_metrics
from unfold.pretrain.train import beside as module
from unfold.pretrain.train.beside import Beside, read_results

RESULT = {"results": [{"name": "forget 4,2", "exact": 0.5, "cells": [], "mode": "forget",
                       "buckets": [{"to": 64, "nats": 2.0}, {"to": 128, "nats": 1.5}]}]}  # fmt: skip
EVALUATES = f"""
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "x.json").write_text(json.dumps({RESULT}))
"""
FAILS = "import sys; print('error: no such file', file=sys.stderr); sys.exit(1)"


@pytest.fixture
def make(tmp_path):
    """make(script, **settings) -> (beside, lines said); its processes run the script."""

    def make(script, **settings):
        said = []
        made = Beside(EvaluationConfig(**settings), tmp_path, said.append)
        add = made._add

        def stand_in(*arguments):
            add(*arguments)
            made._jobs[-1].command[1:3] = ["-c", script]

        made._add = stand_in
        return made, said

    return make


def save(run_dir, step):
    directory = run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / module.MANIFEST).write_text("{}")


def test_results_are_found_in_the_order_of_the_steps(make, tmp_path):
    beside, said = make(EVALUATES, every=2, commands=("passkey --trials 1", "perplexity --data x"), export_every=4)
    assert [beside.due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    for step in (2, 4):
        beside.add(step)
    assert beside.in_use == {2, 4}
    assert beside.poll() == {} and beside._jobs[0].process is None  # the checkpoint is not whole yet
    save(tmp_path, 2)
    save(tmp_path, 4)
    ended = beside.wait(60)
    assert beside.in_use == set() and [step for step, _ in ended] == [2, 2, 4, 4, 4]
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 5):
        metrics.write({"step": step})
    for step, found in ended:
        metrics.amend(step, found)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert ["evaluation" in line for line in lines] == [False, True, False, True]
    assert set(lines[1]["evaluation"]) == {"passkey", "perplexity_1"} and lines[3]["export_step"] == 4
    passkey = lines[1]["evaluation"]["passkey"]
    assert passkey["of_step"] == 2 and passkey["forget 4,2"]["exact"] == 0.5
    assert passkey["forget 4,2"]["nats_by_position"] == {"to_64": 2.0, "to_128": 1.5}
    assert any("step 4 is exported" in line for line in said)
    commands = (tmp_path / "evaluations").glob("step-*/*")
    assert sorted(p.name for p in commands) == ["0-passkey", "0-passkey", "1-perplexity", "1-perplexity"]


def test_what_fails_is_told_and_nothing_else_happens(make, tmp_path):
    beside, said = make(FAILS, export_every=3)
    save(tmp_path, 3)
    beside.add(3)
    assert beside.wait(60) == [(3, {"export_error": "no such file"})]
    assert said == ["error: export of step 3 failed: no such file. Training goes on"]


def test_a_run_that_is_stopped_does_not_wait(make, tmp_path):
    beside, said = make("import time; time.sleep(600)", export_every=3)
    save(tmp_path, 3)
    beside.add(3)
    assert beside.poll() == {}
    beside.close()
    assert said == ["export of step 3 was not done before the run stopped"]


def test_processes_of_a_run_know_nothing_of_its_ranks(make, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    shows = (
        "import os, json, sys; print('error: ' + ' '.join(sorted(k for k in os.environ if 'RANK' in k or 'MASTER' in k)) + '.'"
    )
    beside, _ = make(
        shows + " + os.environ['CUDA_VISIBLE_DEVICES'] + os.environ['OMP_NUM_THREADS']); sys.exit(1)", export_every=1
    )
    save(tmp_path, 1)
    beside.add(1)
    assert beside.wait(60) == [(1, {"export_error": ".2"})]


def test_what_was_not_saved_keeps_nobody_waiting(make, tmp_path):
    beside, said = make(EVALUATES, export_every=1)
    beside.add(1)
    beside.add(2)
    save(tmp_path, 2)
    beside.drop(1)
    assert [step for step, _ in beside.wait(60)] == [2] and beside.in_use == set()
    assert said[0] == "export of step 1 is left out: there is no checkpoint of it"


@pytest.mark.parametrize(
    "settings,told",
    [
        ({"every": 1, "sources": ("wiki",)}, "sources: 'wiki' is not NAME=PREFIX"),
        ({"every": 1, "commands": ("speed --x 1",)}, "does not begin with one of perplexity, passkey"),
        ({"every": 1, "commands": ("passkey --step 3",)}, "gives --step, which the run gives itself"),
        ({"sources": ("a=b",)}, "every: 0 with sources or commands"),
    ],
)
def test_wrong_settings_are_refused(settings, told):
    with pytest.raises(SettingsError) as refused:
        EvaluationConfig(**settings)
    assert told in str(refused.value)


def test_figures_of_a_result(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    assert list(read_results(tmp_path)) == ["forget 4,2"]
