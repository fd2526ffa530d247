"""Layers of several kinds give the losses of one process under every layout, distillation and the routing loss included."""

from __future__ import annotations

import pytest

from tests.integration.runs import train
from tests.parallel.test_layouts import LAYOUTS, NESTED

KINDS = ["gist", "dense", "window:24", "gist"]
LONG = ("ulysses2", "cp2 tp2 sequence", "cp2 dp2 zero2", "cp2 pp2", "dp2 zero3", "dp2 zero2 micro_batch 2", "tp2 pp2 sequence",
        "tp2 sequence selective tiles", "pp2 selective host tiles", "selective, tiles, host", "ulysses2 pp2",
        "cp2 ulysses2", "cp2 ulysses2 pp2", "cp2 ulysses2 zero2 micro_batch 4")  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return tiny.config(
        tmp_path_factory.mktemp("kinds") / "c.yaml",
        model={"layers": 4, "layer_attention": KINDS},
        gist={"chunk_sizes": [4, 2], "recall": "all", "route_loss": 1.0},
        data={"raw_tokens": 256},
    )


STEPS = ["train.steps=4", "train.valid_every=2"]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("alone") / "run", 1, *STEPS)


def same(metrics: list[dict], alone: list[dict]) -> None:
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        assert got.get("valid_loss") == pytest.approx(want.get("valid_loss"), abs=1e-5)
        assert got["unfolded_tokens"] == pytest.approx(want["unfolded_tokens"], rel=1e-5) and want["unfolded_tokens"] > 0


@pytest.mark.parametrize("name", ["cp2", *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_a_layout_gives_the_losses_of_one_process(name, config, alone, tmp_path):
    ranks, settings = LAYOUTS[name]
    same(train(config, tmp_path / "run", ranks, *STEPS, *settings), alone)


@pytest.mark.long
@pytest.mark.parametrize("name", ["cp2", "tp2 sequence", "ulysses2", "cp2 ulysses2"])
def test_a_teacher_keeps_its_windows(name, config, tmp_path):
    """In layers that forget: where every token selects too, what rounds differently adds up to more."""
    ranks, settings = LAYOUTS[name]
    taught = ["distill.hidden=1.0", "distill.logits=0.5", "gist.recall=none", "gist.route_loss=0"]
    runs = [train(config, tmp_path / f"run{n}", n, *STEPS, *taught, *more) for n, more in ((1, []), (ranks, settings))]
    for got, want in zip(runs[1], runs[0], strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        for name in ("distill_logits", "distill_hidden"):
            assert got[name] == pytest.approx(want[name], rel=2e-5)


@pytest.mark.long
def test_every_way_of_sharing_goes_together(tiny, tmp_path):
    """Tensor-parallel ranks that share sequences both ways: eight, each with one of four KV heads of a part."""
    model = {"layers": 4, "layer_attention": KINDS, "heads": 8, "kv_heads": 4}
    gist = {"chunk_sizes": [4, 2], "recall": "all", "route_loss": 1.0}
    config = tiny.config(tmp_path / "c.yaml", model=model, gist=gist, data={"raw_tokens": 256})
    alone = train(config, tmp_path / "alone", 1, *STEPS)
    same(train(config, tmp_path / "run", 8, *STEPS, *NESTED, "parallel.tensor=2", "parallel.sequence=true"), alone)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ulysses2", "tp2 pp2", "dp2 zero3"])
def test_windows_without_gists(name, tiny, tmp_path):
    config = tiny.config(tmp_path / "c.yaml", model={"attention": "dense", "layer_attention": ["window:24", "dense"]})
    ranks, settings = LAYOUTS[name]
    runs = [train(config, tmp_path / f"run{n}", n, *STEPS, *more) for n, more in ((1, []), (ranks, settings))]
    for got, want in zip(runs[1], runs[0], strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
