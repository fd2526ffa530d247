"""Where attention goes is the same under every parallel layout, and stands in the metrics of each validation."""

import pytest

from tests.integration.runs import train

LAYOUTS = {
    "tensor": (2, "parallel.tensor=2"),
    "pipeline": (2, "parallel.pipeline=2"),
    "context": (2, "parallel.context=2"),
    "both": (4, "parallel.context=4", "parallel.context_heads=2"),
}
SHORT = ("train.steps=2", "train.valid_every=1", "train.valid_samples=1", "data.raw_tokens=48")  # every query is sampled


def masses(metrics: list[dict]) -> list[float]:
    return [share for m in metrics for share in m["attention_mass"].values()]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    where = tmp_path_factory.mktemp("mass")
    config = tiny.config(where / "config.yaml")
    return config, train(config, where / "run", 1, *SHORT)


def test_shares_add_up_at_every_validation(alone):
    for metrics in alone[1]:
        assert list(metrics["attention_mass"]) == ["gist_1", "gist_0", "raw", "sink"]
        assert sum(metrics["attention_mass"].values()) == pytest.approx(1)
        assert metrics["memory_gib"] > 0 and "mfu" not in metrics


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout, alone, tmp_path):
    ranks, *settings = LAYOUTS[layout]
    metrics = train(alone[0], tmp_path / "run", ranks, *SHORT, *settings)
    assert masses(metrics) == pytest.approx(masses(alone[1]), rel=2e-5)
