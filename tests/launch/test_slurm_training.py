"""Training on a real SLURM cluster: signals, dead ranks, dead nodes, preemption, cancellation."""

import re
import subprocess

import psutil
import pytest

from pretrain.monitor import read_metrics
from tests.conftest import module
from tests.integration.runs import series
from tests.launch.conftest import EVERY, STEPS

EXACT = ("step", "loss", "grad_norm", "sample_range", "samples")


@pytest.fixture(scope="module")
def jobs(cluster, config, tmp_path_factory):
    """All jobs are submitted at once, so that one computes while another waits for SLURM."""
    root = tmp_path_factory.mktemp("runs with blanks")
    return {
        "plain": cluster.train(config, root / "plain", 2, "--time", 30),
        "disturbed": cluster.train(config, root / "disturbed", 2, "--time", 30),
        "preempted": cluster.train(
            config, root / "preempted", 1, "--time", 30, "--partition", "low", "--nodelist", "node4", "--ranks-per-node", 2
        ),
    }


def ranks_of(job, restart: int) -> list[psutil.Process]:
    """The processes of a start that train, on all nodes: this host sees them all."""
    mark = f"UNFOLD_JOB={job.number}.{restart}"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        try:
            if "pretrain" in words and "torch.distributed.run" not in words and words[0] != "bash":
                if mark in (f"{k}={v}" for k, v in process.environ().items()) and "RANK" in process.environ():
                    found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def test_a_disturbed_run_learns_the_same(cluster, jobs):
    """The signal before the time limit, then a killed rank, then a killed node: each is one requeue and loses at most one
    checkpoint interval; the losses are those of a run that nothing happened to."""
    job = jobs["disturbed"]
    job.wait_for(lambda: job.started(0), "the first step")
    cluster.ask("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait_for(lambda: "stopped by the signal" in job.log(), "the save")
    saved = job.checkpoints()[-1]
    assert saved == job.steps_done() and "stopped by SIGUSR1; the state is saved" in job.ranks_log(0)

    job.wait_for(lambda: job.started(1), "the second start")
    assert f"resumed at step {saved}" in job.ranks_log(1)
    ranks_of(job, 1)[-1].kill()
    job.wait_for(lambda: "the ranks ended early" in job.log(), "the end of the ranks")
    reached, kept = job.steps_done(), job.checkpoints()[-1]
    assert saved <= kept <= reached < kept + EVERY + 5, "at most one interval is lost"

    job.wait_for(lambda: job.started(2), "the third start")
    assert f"resumed at step {kept}" in job.ranks_log(2)
    node = re.search(r"start 2, on node\[?(\d)", job.log())[1]
    cluster.kill(f"node{node}")
    reached, kept = job.steps_done(), max(job.checkpoints())
    assert reached < kept + 2 * EVERY
    try:
        job.wait_for(lambda: "start 3, on " in job.log(), "SLURM's requeue")
        assert f"node{node}" not in cluster.ask("scontrol", "show", "hostnames", job.show("NodeList")).split()
    finally:
        assert cluster.up() == ""
    assert job.end() == "COMPLETED" and f"finished: checkpoint of step {STEPS}" in job.log()
    assert int(job.show("Restarts")) == 3

    assert jobs["plain"].end() == "COMPLETED" and jobs["plain"].show("Restarts") == "0"
    mine, plain = (read_metrics(jobs[name].run_dir / "metrics.jsonl") for name in ("disturbed", "plain"))
    assert series(mine, *EXACT) == series(plain, *EXACT)
    assert [m["step"] for m in plain] == list(range(1, STEPS + 1))


def test_preemption_saves_and_goes_on(cluster, jobs):
    job = jobs["preempted"]
    job.wait_for(lambda: job.started(0), "the first step")
    line = ["sbatch", "--parsable", "--partition=main", "--exclusive", "--nodelist=node4", "--time=2", "--output=/dev/null"]
    other = subprocess.run([*line, "--wrap=sleep 5"], env=cluster.environment, check=True, capture_output=True, text=True)
    job.wait_for(lambda: job.started(1), "the start after the preemption")
    assert "stopped by SIG" in job.ranks_log(0)
    resumed = int(re.search(r"resumed at step (\d+)", job.ranks_log(1))[1])
    assert resumed in job.checkpoints() and resumed > 0
    assert cluster.ask("squeue", "--noheader", "--states=all", "--jobs", other.stdout.strip(), "--format=%T") == "COMPLETED"
    cluster.ask("scancel", str(job.number))


def test_four_nodes_one_task_per_rank_cancelled(cluster, config, tmp_path):
    """Cancelling leaves a whole checkpoint; meanwhile the run directory is refused to others."""
    job = cluster.train(config, tmp_path / "run", 4, "--launcher", "srun", "--set", "train.steps=100000", "--time", 30)
    job.wait_for(lambda: job.steps_done() >= EVERY, "steps")
    again = cluster.launch(
        *("slurm", "--config", config, "--run-dir", job.run_dir, "--nodes", 1, "--gpus-per-node", 0),
        *("--set", "train.steps=100000"), check=False,
    )  # fmt: skip
    assert again.returncode == 1 and f"job {job.number} (RUNNING) has this run directory" in again.stderr
    script = next(job.run_dir.glob("launch/*.sbatch"))  # submitted by hand, past the check
    second = cluster.ask("sbatch", "--parsable", "--nodes=1", str(script))
    other = type(job)(cluster, int(second), job.run_dir)
    assert other.end() == "FAILED" and f"error: job {job.number} (RUNNING) has the run directory" in other.log()

    cluster.ask("scancel", str(job.number))
    assert job.end() == "CANCELLED" and job.show("Restarts") == "0"
    assert module("pretrain", "checkpoints", job.run_dir, "--verify").stdout.count(": whole") == len(job.checkpoints()) > 0
    assert "4 node(s) fit" in job.log()
    assert job.steps_done() - job.checkpoints()[-1] <= EVERY


@pytest.mark.long
def test_the_real_time_limit(cluster, config, tmp_path):
    """SLURM's own signal, again and again, until a run that is longer than the limit is done."""
    job = cluster.train(config, tmp_path / "run", 2, "--time", 2, "--signal-lead", 45, "--set", "train.steps=6000")
    assert job.end(1500) == "COMPLETED"
    assert int(job.show("Restarts")) >= 1 and "SIGUSR1 (the time limit is near" in job.log()
    assert [m["step"] for m in read_metrics(job.run_dir / "metrics.jsonl")] == list(range(1, 6001))
