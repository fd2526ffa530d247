"""A run that is killed again and again, each time resumed under another kind of layout, writes the losses of one process."""

import pytest

from tests.integration.runs import read_metrics, run_to_end, train, train_until_killed
from tests.parallel.test_layouts import LAYOUTS, STEPS


@pytest.mark.parametrize(
    "first,second,last",
    [("pp2", "cp2", "tp2"), pytest.param("cp2", "cp2 ulysses2", "ulysses2", marks=pytest.mark.long)],
)
def test_a_run_moves_through_layouts(first, second, last, tiny, tmp_path):
    config = tiny.config(tmp_path / "c.yaml")
    alone = train(config, tmp_path / "alone", 1, STEPS)
    run_dir = tmp_path / "moved"
    for step, name in ((4, first), (7, second)):
        ranks, settings = LAYOUTS[name]
        train_until_killed(config, run_dir, ranks, step, STEPS, *settings)
    ranks, settings = LAYOUTS[last]
    for got, want in zip(train(config, run_dir, ranks, STEPS, *settings), alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * max(1, want["loss"])
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        assert got["samples"] == want["samples"]


def test_a_pipeline_skips_a_bad_step(tiny, tmp_path):
    """One poisoned sample: the last stage's NaN reaches no stage's weights, and all stages count the step as skipped."""
    config = tiny.config(tmp_path / "c.yaml", data={"valid": []})
    module = ("tests.integration.faulty", "nan=9")
    done = run_to_end(config, tmp_path / "run", 2, "train.steps=5", "parallel.pipeline=2", module=module)
    assert "step 3: loss nan or its gradient is not finite; skipped samples 8..11" in done.stderr
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [bool(m.get("skipped")) for m in metrics] == [False, False, True, False, False]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
