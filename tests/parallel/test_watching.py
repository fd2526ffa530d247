"""What is measured beside training: norms by layer and kind, attention logits; and that measuring changes no loss."""

from __future__ import annotations

import json
import math

import pytest

from tests.integration.runs import series, train
from unfold.pretrain.monitor.ledger import read_ledger
from unfold.pretrain.monitor.norms import KINDS, OUTSIDE, slot_of

WATCHED = [
    "monitor.norms_every=2", "monitor.attention_logits=true", "monitor.flight_recorder=100", "monitor.memory_snapshot=2"
]  # fmt: skip
NORMS = ("grad_norms", "update_norms", "weight_norms")


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    train = {"steps": 4, "valid_every": 4, "valid_samples": 2, "clip": 0.5}
    return tiny.config(tmp_path_factory.mktemp("watching") / "c.yaml", train=train, gist={"chunk_sizes": [4, 2], "recall": "all"})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return run_dir, train(config, run_dir, 1, *WATCHED)


def flat(norms):
    return [x for value in norms.values() for x in (value if isinstance(value, list) else [value])]


def test_measuring_changes_no_loss(config, alone, tmp_path):
    plain = train(config, tmp_path / "run", 1)
    assert series(plain, "loss", "grad_norm", "valid_loss") == series(alone[1], "loss", "grad_norm", "valid_loss")
    assert not any(key in line for line in plain for key in (*NORMS, "attention_logits"))


def test_norms_of_all_parts_are_the_norm_of_the_whole(alone):
    run_dir, metrics = alone
    assert [all(name in line for name in NORMS) for line in metrics] == [False, True, False, True]
    for line in (metrics[1], metrics[3]):
        assert line["grad_norm"] > 0.5  # so that the step was clipped
        assert math.isclose(math.hypot(*flat(line["grad_norms"])), line["grad_norm"], rel_tol=1e-5)
        assert set(line["grad_norms"]) == {"embedding", "final_norm", "attention", "mlp", "norms"}
        # AdamW moves every element by about the learning rate at first.
        assert 0.1 * line["lr"] < line["update_norms"]["final_norm"] / math.sqrt(64) < 1.1 * line["lr"]
    assert 0.9 < metrics[1]["weight_norms"]["final_norm"] / math.sqrt(64) < 1.1
    assert "there is no GPU whose memory could be looked at" in run_dir.with_suffix(".log").read_text()
    spent = read_ledger(run_dir)["spent"]
    assert spent["training"] > 0 and spent["startup"] > 0 and spent["validation"] > 0


def test_attention_logits_and_entropy(alone):
    found = alone[1][3]["attention_logits"]
    assert found["largest"] == max(found["largest_by_layer"]) > 0 and len(found["largest_by_layer"]) == 2
    assert 0 <= found["saturated"] < 0.5
    assert 0 < found["entropy"] < math.log(128)
    assert all(0 < alone[1][3]["routing"][f"selection_entropy_{level}"] <= 1 for level in (0, 1))


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.zero=3"],
        *(pytest.param([f"parallel.{name}=2"], marks=pytest.mark.long) for name in ("zero", "pipeline", "context")),
    ],
)
def test_a_layout_measures_the_same(config, alone, tmp_path, layout):
    metrics = train(config, tmp_path / "run", 2, *WATCHED, *layout)
    for got, want in zip(metrics, alone[1], strict=True):
        for name in NORMS:
            if name in want:
                assert got[name].keys() == want[name].keys()
                for a, b in zip(flat(got[name]), flat(want[name]), strict=True):
                    assert math.isclose(a, b, rel_tol=1e-4)
    if "context" not in layout[0]:
        got, want = (m[3]["attention_logits"]["largest"] for m in (metrics, alone[1]))
        assert math.isclose(got, want, rel_tol=1e-4) or "zero" in layout[0]  # which looks at other samples first


def test_every_parameter_counts_to_one_part():
    names = ["embedding.weight", "embedding.rows", "head.weight", "final_norm.weight"]
    assert [slot_of(n, 2) for n in names] == [0, 0, 1, 2]
    parts = ["attention.qkv.weight", "mlp.down.weight", "mlp_norm.weight", "attention.qkv.lora_a"]
    assert [slot_of(f"layers.1.{p}", 2) - len(OUTSIDE) for p in parts] == [len(KINDS) + i for i in range(4)]
    assert slot_of("layers.0.attention.q_norm.weight", 2) == len(OUTSIDE) + 2


def test_the_recorder_of_collectives_is_written_when_a_rank_hangs(tmp_path):
    """By the watchdog, for torchfrtrace."""
    import subprocess
    import sys

    from tests.conftest import ROOT

    script = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from unfold.pretrain.safety.flight import record_collectives
run_dir = Path(sys.argv[1])
record_collectives(10, run_dir)
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3))
from unfold.pretrain.safety.watchdog import Watchdog
with Watchdog(run_dir, SimpleNamespace(rank=0, world=1), 1.0) as watchdog:
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 70 and "the last collectives of rank 0" in done.stderr
    assert (tmp_path / "stacks" / "collectives-rank-0").stat().st_size > 100
    calls = json.loads((tmp_path / "stacks" / "calls-rank-0.json").read_text())
    assert [call["profiling_name"] for call in calls["entries"]] == ["gloo:all_reduce"]
