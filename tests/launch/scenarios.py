"""Training on a real SLURM cluster, undisturbed and disturbed in every way. Each has nodes of its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psutil

from tests.conftest import module
from tests.launch.cluster import Cluster, Job

STEPS, EVERY = 300, 40


def plain(cluster: Cluster, config: Path, run_dir: Path) -> Job:
    """Nothing happens to it."""
    job = cluster.train(config, run_dir, 1, "--time", 30, "--exclude", "node[1-3,5-9]", "--ranks-per-node", 2)
    assert job.end() == "COMPLETED" and job.show("Restarts") == "0"
    return job


def disturbed(cluster: Cluster, config: Path, run_dir: Path) -> Job:
    """The signal before the time limit, then a killed rank, then a killed node: each is one requeue, and loses at most one
    checkpoint interval."""
    job = cluster.train(config, run_dir, 2, "--time", 30, "--exclude", "node[4-9]")
    job.wait_for(lambda: job.started(0), "the first step")
    cluster.ask("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait_for(lambda: "stopped by the signal" in job.log(), "the save")
    saved = job.checkpoints()[-1]
    assert saved == job.steps_done() and "stopped by SIGUSR1; the state is saved" in job.ranks_log(0)
    assert "Traceback" not in job.ranks_log(0)

    job.wait_for(lambda: job.started(1), "the second start")
    assert f"resumed at step {saved}\n" in job.ranks_log(1)
    ranks_of(job, 1)[-1].kill()
    job.wait_for(lambda: "the ranks ended early" in job.log(), "the end of the ranks")
    reached, kept = job.steps_done(), job.checkpoints()[-1]
    assert saved <= kept <= reached < kept + EVERY + 5, "at most one interval is lost"

    job.wait_for(lambda: job.started(2), "the third start")
    assert f"resumed at step {kept}\n" in job.ranks_log(2)
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
    return job


def preempted(cluster: Cluster, config: Path, run_dir: Path) -> Job:
    """A job of a partition that goes first takes its node for some seconds."""
    where = ("--partition", "low", "--exclude", "node[1-4,6-9]")
    job = cluster.train(config, run_dir, 1, "--time", 30, *where, "--ranks-per-node", 2, "--set", "train.steps=100000")
    job.wait_for(lambda: job.started(0), "the first step")
    line = ["sbatch", "--parsable", "--partition=main", "--exclusive", "--nodelist=node5", "--time=2", "--output=/dev/null"]
    other = subprocess.run([*line, "--wrap=sleep 3"], env=cluster.environment, check=True, capture_output=True, text=True)
    job.wait_for(lambda: job.started(1), "the start after the preemption")
    cluster.ask("scancel", str(job.number))
    assert "stopped by SIG" in job.ranks_log(0)
    resumed = int(re.search(r"resumed at step (\d+)", job.ranks_log(1))[1])
    assert resumed in job.checkpoints() and resumed > 0
    assert cluster.ask("squeue", "--noheader", "--states=all", "--jobs", other.stdout.strip(), "--format=%T") == "COMPLETED"
    return job


def cancelled(cluster: Cluster, config: Path, run_dir: Path) -> Job:
    """Four nodes, one task per rank; the run directory is refused to others, and cancelling leaves whole checkpoints."""
    endless = ("--set", "train.steps=100000")
    job = cluster.train(config, run_dir, 4, "--launcher", "srun", *endless, "--time", 30, "--exclude", "node[1-5]")
    job.wait_for(lambda: job.steps_done() >= EVERY, "steps")
    where = ("slurm", "--config", config, "--run-dir", run_dir, "--nodes", 1, "--gpus-per-node", 0)
    again = cluster.launch(*where, *endless, check=False)
    assert again.returncode == 1 and f"job {job.number} (RUNNING) has this run directory" in again.stderr
    script = next(run_dir.glob("launch/*.sbatch"))  # submitted by hand, past the check
    other = Job(cluster, int(cluster.ask("sbatch", "--parsable", "--nodes=1", str(script))), run_dir)
    assert other.end() == "FAILED" and f"error: job {job.number} (RUNNING) has the run directory" in other.log()

    cluster.ask("scancel", str(job.number))
    assert job.end() == "CANCELLED" and job.show("Restarts") == "0"
    assert module("pretrain", "checkpoints", run_dir, "--verify").stdout.count(": whole") == len(job.checkpoints()) > 0
    assert "all 4 node(s) fit" in job.log()
    assert job.steps_done() - job.checkpoints()[-1] <= EVERY
    return job


ALL = (disturbed, plain, preempted, cancelled)


def ranks_of(job: Job, restart: int) -> list[psutil.Process]:
    """The processes of a start that train, on all nodes: this host sees them all."""
    found = []
    for process in psutil.process_iter():
        try:
            words, environment = process.cmdline(), process.environ()
        except (psutil.Error, OSError):
            continue
        mine = environment.get("UNFOLD_JOB") == f"{job.number}.{restart}" and environment.get("SLURM_CONF") == job.conf
        if mine and "RANK" in environment and "unfold.pretrain" in words:
            found.append(process)
    return found
