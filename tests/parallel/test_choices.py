"""Chunk sizes that samples draw: the same draws, losses and losses by choice under every layout, and after a resume."""

from __future__ import annotations

import shutil

import pytest

from tests.integration.runs import series
from tests.training import train_ranks
from unfold.model.config import sizes_name
from unfold.pretrain.config import load_config
from unfold.pretrain.data.choices import drawn

CHOICES = [{"chunk_sizes": [4, 2]}, {"chunk_sizes": [8]}, {"chunk_sizes": [4, 2, 2], "weight": 2}]
STEPS = 4


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """Every raw token recalls, by the budget of its sample's own ratio, and the routing loss is taken."""
    gist = {"chunk_sizes": [4, 2], "choices": CHOICES, "recall": "all", "route_loss": 1.0, "route_queries": 16}
    train = {"steps": STEPS, "valid_every": 2, "valid_samples": 2}
    path = tmp_path_factory.mktemp("choices") / "c.yaml"
    return tiny.config(path, gist=gist, train=train, checkpoint={"every": 2}, model={"kv_heads": 4})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """(run directory, metrics) of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return run_dir, train_ranks(config, run_dir, 1)


def close(got, want):
    """Figures of every step, those by choice included."""
    for a, b in zip(got, want, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2e-6 * b["loss"]
        assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-5 * b["grad_norm"]
        by_choice = {key for key in b if key.startswith("loss.")}
        assert by_choice and by_choice == {key for key in a if key.startswith("loss.")}
        for key in (*by_choice, "unfolded_tokens", "route_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
        assert a.get("valid_loss") == pytest.approx(b.get("valid_loss"), abs=1e-5)


@pytest.mark.parametrize(
    "ranks,layout",
    [
        (1, ["train.micro_batch=4"]),
        (2, ["parallel.zero=2", "train.micro_batch=2"]),
        (2, ["parallel.context=2"]),
        long(2, ["parallel.context=2", "train.micro_batch=4"]),
        long(2, ["parallel.context=2", "parallel.context_method=ulysses", "train.micro_batch=2"]),
        long(2, ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch=2"]),
        long(2, ["parallel.pipeline=2"]),
        long(2, ["parallel.pipeline=2", "train.micro_batch=2"]),
        long(4, ["parallel.pipeline=2", "parallel.context=2", "train.micro_batch=2"]),
        long(2, ["parallel.zero=3"]),
    ],
)
def test_a_layout_gives_the_losses_of_one_process(config, alone, tmp_path, ranks, layout):
    """Samples of different choices share micro-batches, or are on ranks of their own."""
    close(train_ranks(config, tmp_path / "run", ranks, *layout), alone[1])


def test_a_resume_draws_the_same(config, alone, tmp_path):
    run_dir, want = alone
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    got = train_ranks(config, tmp_path / "run", 1)
    names = ["loss", "grad_norm", *(f"loss.{sizes_name(tuple(c['chunk_sizes']))}" for c in CHOICES)]
    assert series(got, *names) == series(want, *names)


def test_losses_by_choice_are_those_of_the_samples_that_drew_it(config, alone):
    """Every document is all text, so the loss of a step is the mean of them by loss tokens; and which were drawn is known."""
    settings = load_config(config)
    batch = settings.train.global_batch
    for step, line in enumerate(alone[1]):
        names = {sizes_name(drawn(settings.gist, settings.train.seed, n).chunk_sizes) for n in range(step * batch, (step + 1) * batch)}
        assert {key.removeprefix("loss.") for key in line if key.startswith("loss.")} == names
        by_choice = [line[f"loss.{name}"] for name in names]
        assert min(by_choice) <= line["loss"] * (1 + 1e-6) and line["loss"] <= max(by_choice) * (1 + 1e-6)
