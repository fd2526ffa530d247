"""Training on a real SLURM cluster: what tests.launch.scenarios do, and what must have come of it."""

import pytest

from pretrain.monitor import read_metrics
from tests.integration.runs import series
from tests.launch.scenarios import STEPS

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
    """SLURM's own signal, again and again, until a run that is longer than the limit is done."""
    job = cluster.train(config, tmp_path / "run", 2, "--time", 2, "--signal-lead", 45, "--set", "train.steps=4000")
    assert job.end(1500) == "COMPLETED"
    assert int(job.show("Restarts")) >= 1 and "SIGUSR1 (the time limit is near" in job.log()
    assert [m["step"] for m in read_metrics(job.run_dir / "metrics.jsonl")] == list(range(1, 4001))
