"""Biases of all projections, split over tensor-parallel ranks or whole: training, checkpoint, loading."""

import torch

from tests.integration.runs import series, train
from unfold.pretrain.checkpoint.load import load_run


def test_split_biases_train_and_load_like_whole_ones(tiny, tmp_path):
    scaling = {"kind": "llama3", "factor": 4.0, "original_max_position": 64}
    parts = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "nope_layers": [1]}
    config = tiny.config(tmp_path / "c.yaml", model={**parts, "rope_scaling": scaling})
    # A run begun on one rank goes on on two, and one process loads it: whole biases become parts, and whole again.
    alone = train(config, tmp_path / "alone", 1, "train.steps=6")
    begun = train(config, tmp_path / "mixed", 1, "train.steps=6", "checkpoint.stop_after_minutes=0.0001")
    assert 0 < len(begun) < 6
    mixed = train(config, tmp_path / "mixed", 2, "train.steps=6", "parallel.tensor=2")
    for (a,), (b,) in zip(series(alone, "loss"), series(mixed, "loss"), strict=True):
        assert abs(a - b) <= 2e-6 * a
    whole, joined = (dict(load_run(tmp_path / name, None).model.named_parameters()) for name in ("alone", "mixed"))
    biases = [name for name in whole if name.endswith("qkv.bias")]
    assert len(biases) == 2 and all(whole[name].any() for name in biases)
    # Scores hardly depend on a key's bias; where its gradient is rounding alone, Adam still steps by the learning rate.
    group, dim = 2 + 2, 16
    for name, value in whole.items():
        parts = [x.view(-1, group, dim)[:, [0, 1, 3]] if name in biases else x for x in (value, joined[name])]
        assert torch.allclose(*parts, atol=1e-4), name
