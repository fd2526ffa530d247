"""Head norms, biases of every projection and layers without rotary positions: split over ranks, a model trains like whole."""

from __future__ import annotations

import pytest

from tests.integration.runs import train
from tests.parallel.test_layouts import LAYOUTS

FAMILIES = {
    "qwen3": {"qk_norm": True, "qkv_bias": True, "output_bias": True, "rope_scaling": {"kind": "yarn", "factor": 4.0}},
    "smollm3": {"nope_layers": [1], "qkv_bias": True, "output_bias": True, "mlp_bias": True, "tied_embeddings": False},
}
LONG = pytest.mark.long


@pytest.mark.parametrize(
    "family,layout",
    [
        ("qwen3", "tp2 pp2 sequence"),
        *(
            pytest.param(f, name, marks=LONG)
            for f, name in [
                ("qwen3", "tp2"),
                ("qwen3", "tp2 dp2 zero3"),
                ("qwen3", "cp2 tp2 sequence"),
                ("qwen3", "ulysses2"),
                ("smollm3", "tp2 sequence"),
                ("smollm3", "tp2 pp2"),
                ("smollm3", "dp2 zero3 offload"),
                ("smollm3", "cp2 pp2"),
            ]
        ),
    ],
)
def test_a_family_trains_alike_under_every_layout(tiny, tmp_path, family, layout):
    config = tiny.config(tmp_path / "c.yaml", model=FAMILIES[family], data={"valid": []})
    alone = train(config, tmp_path / "alone", 1, "train.steps=5")
    ranks, settings = LAYOUTS[layout]
    for got, want in zip(train(config, tmp_path / "run", ranks, "train.steps=5", *settings), alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * max(1, want["loss"])
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
