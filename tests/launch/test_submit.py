"""Submitting where sbatch says more than a number, or less, and from within an allocation: with stand-ins for SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from unfold.launch.submit import job_environment, job_number, living_jobs, refuse_second_job, submit
from unfold.pretrain.errors import UserError


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "launch" / "run-001.sbatch"
    path.parent.mkdir()
    path.write_text("#!/bin/bash")
    return path


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts commands in front of the path: name -> lines of bash."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(**lines):
        for name, text in lines.items():
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)

    make(squeue="exit 1")
    return make


def jobs(script):
    return [json.loads(line) for line in (script.parent / "jobs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "said,number",
    [
        ("4711\n", 4711),
        ("4711;cluster2\n", 4711),
        ("submit filter: 2 accounts, default chosen\n4711\n", 4711),
        ("quota of 100 GB\n  4711;east \nthank you\n", 4711),
        ("", None),
        ("Submitted batch job 4711\n", None),
    ],
)
def test_the_number_among_other_lines(said, number):
    assert job_number(said) == number


def test_a_job_whose_number_was_not_said_is_found_by_its_script(script, commands):
    commands(sbatch="echo 'Submitted, good luck'", squeue=f"echo '12|/other'; echo '4711|{script}'")
    assert submit(script, "train", script.with_name("run-%j.log")).number == 4711
    assert jobs(script)[0]["job"] == 4711 and jobs(script)[0]["log"].endswith("run-4711.log")


def test_a_late_controller_may_have_queued_it(script, commands, capsys):
    commands(sbatch="echo 'sbatch: error: Socket timed out' >&2; exit 1", squeue=f"echo '4711|{script}'")
    assert submit(script, "train", script.with_name("run-%j.log")).number == 4711
    assert "note: sbatch reported an error (Socket timed out), but job 4711 is in the queue" in capsys.readouterr().err
    commands(squeue="exit 1")
    with pytest.raises(UserError, match="sbatch refused .*Socket timed out"):
        submit(script, "train", script.with_name("run-%j.log"))


def test_a_queued_job_is_never_unknown(script, commands):
    """Without any number, it is noted by its script; a second submission finds it when squeue shows it."""
    commands(sbatch="echo queued")
    with pytest.raises(UserError, match="gave no job number .*'queued'.*before you submit again"):
        submit(script, "train", script.with_name("run-%j.log"))
    assert jobs(script)[0]["job"] is None
    commands(squeue=f"[ \"$2\" = --format ] && echo '4711|{script}' || echo PENDING")
    with pytest.raises(UserError, match="job 4711 .PENDING. has this run directory"):
        refuse_second_job(script.parent, "")


def test_a_torn_line_of_the_jobs_hides_no_other(script, commands, capsys):
    commands(sbatch="echo 4711", squeue="echo RUNNING")
    (script.parent / "jobs.jsonl").write_text('{"job": 1, "kind": "train", "scr')
    submit(script, "train", script.with_name("run-%j.log"))
    assert living_jobs(script.parent, "train") == [(4711, "RUNNING")]
    assert "jobs.jsonl:1: is damaged and passed over" in capsys.readouterr().err


def test_nothing_of_the_allocation_reaches_the_job(script, commands, tmp_path, monkeypatch, capsys):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    given = {"SLURM_MEM_PER_CPU": "2000", "SLURM_CPU_BIND": "quiet", "SRUN_DEBUG": "3", "SBATCH_PARTITION": "gpu", "MINE": "kept"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    commands(sbatch=f"env > '{tmp_path}/env'; echo 4711")
    submit(script, "train", script.with_name("run-%j.log"))
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert {n for n in seen if n.startswith(("SLURM_", "SBATCH_", "SRUN_"))} == {"SLURM_CONF"} and seen["MINE"] == "kept"
    assert "note: SBATCH_PARTITION: not passed on; say it by a flag" in capsys.readouterr().err
    assert job_environment()["SLURM_CONF"] == "/etc/slurm.conf"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core alone: nothing to tell apart")
def test_threads_follow_the_cores_that_are_allowed(tmp_path):
    from tests.conftest import TinyData

    data = TinyData(tmp_path)
    data.tokenizer.mkdir()
    for prefix in (data.train, data.valid):
        prefix.with_suffix(".bin").touch()
    config = data.config(tmp_path / "c.yaml")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    words = [sys.executable, "-m", "launch", "local", "--config", config, "--run-dir", tmp_path / "r", "--ranks", 1, "--dry-run"]
    core = str(min(os.sched_getaffinity(0)))
    for prefix, threads in ((["taskset", "-c", core], 1), ([], len(os.sched_getaffinity(0)))):
        done = subprocess.run([*prefix, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"OMP_NUM_THREADS={threads} ")
