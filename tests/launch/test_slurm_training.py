"""Training on a real SLURM cluster: what tests.launch.scenarios do, and what must have come of it."""

import re

import pytest

from tests.integration.runs import series
from tests.launch.scenarios import EVERY, STEPS
from unfold.pretrain.monitor.metrics import read_metrics

pytestmark = pytest.mark.slurm
EXACT = ("step", "loss", "grad_norm", "sample_range", "samples")


def test_preemption_saves_and_goes_on(runs):
    runs["preempted"].result()


def test_cancelling_leaves_whole_checkpoints_and_nobody_else_gets_in(runs):
    runs["cancelled"].result()


def test_a_disturbed_run_learns_the_same(runs):
    """Signal, dead rank and dead node later, the losses are to the last bit those of a run that nothing happened to."""
    mine, plain = (read_metrics(runs[name].result().run_dir / "metrics.jsonl") for name in ("disturbed", "plain"))
    assert [m["step"] for m in plain] == list(range(1, STEPS + 1))
    assert series(mine, *EXACT) == series(plain, *EXACT)


@pytest.mark.long
def test_the_real_time_limit(cluster, config, tmp_path):
    """SLURM's own signal comes early enough, and the next start goes on at the step that was saved then."""
    job = cluster.train(config, tmp_path / "run", 2, "--time", 3, "--signal-lead", 60, "--set", "train.steps=100000")
    job.wait_for(lambda: job.started(1), "the start after the time limit", 900)
    cluster.ask("scancel", str(job.number))
    assert "SIGUSR1 (the time limit is near" in job.log() and "stopped by SIGUSR1; the state is saved" in job.ranks_log(0)
    saved = int(re.search(r"stopped by the signal; newest checkpoint: step (\d+)", job.log())[1])
    assert saved > EVERY and f"resumed at step {saved}\n" in job.ranks_log(1)
    job.end()
    steps = [m["step"] for m in read_metrics(job.run_dir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > saved
