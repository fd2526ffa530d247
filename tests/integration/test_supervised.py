"""Recall tuning: whole runs on supervised shards, under several layouts, resumed, and blended with plain text."""

import pytest

from tests.conftest import module
from tests.integration.runs import series, train, train_until_killed
from tests.integration.test_train import EXACT
from tests.supervised import make_shard
from unfold.pretrain.config import load_config
from unfold.pretrain.errors import UserError
from unfold.pretrain.train.inputs import open_inputs

STEPS = "train.steps=8"


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """Recall tuning on a blend of questions and plain text."""
    root = tmp_path_factory.mktemp("supervised")
    shards, valid = make_shard(tiny, root / "questions"), make_shard(tiny, root / "valid", 12, seed=1)
    return tiny.config(
        root / "c.yaml",
        gist={"chunk_sizes": [4, 2], "recall": "suffix"},
        data={"train": [f"{shards} weight=0.75", f"{tiny.train} weight=0.25"], "valid": [str(valid)], "raw_tokens": 256},
        train={"steps": 8, "global_batch": 4, "valid_every": 4, "valid_samples": 3},
    )


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("alone") / "run")


LAYOUTS = {
    "dp2 zero2": ["parallel.zero=2"],
    "pp2": ["parallel.pipeline=2", "train.micro_batch=2"],
    "ulysses2": ["parallel.context=2", "parallel.context_method=ulysses"],
    "cp2": ["parallel.context=2"],
    "cp2 ulysses2": ["parallel.context=4", "parallel.context_heads=2"],
    "tp2 sequence": ["parallel.tensor=2", "parallel.sequence=true"],
}
SHORT = ("dp2 zero2", "pp2")


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in LAYOUTS])
def test_several_ranks_give_the_losses_of_one(name, config, alone, tmp_path):
    metrics = train(config, tmp_path / "run", 4 if name == "cp2 ulysses2" else 2, *LAYOUTS[name])
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        assert got.get("valid_loss") == pytest.approx(want.get("valid_loss"), abs=1e-5)
        assert (got["loss_tokens"], got["source_samples"]) == (want["loss_tokens"], want["source_samples"])


def test_it_learns_and_counts(alone):
    assert alone[-1]["valid_loss"] < alone[3]["valid_loss"]
    assert alone[-1]["source_samples"] == [24, 8]
    assert all(m["unfolded_tokens"] > 0 for m in alone)


def test_a_killed_run_writes_the_same_losses(config, alone, tmp_path):
    run_dir = tmp_path / "run"
    train_until_killed(config, run_dir, 1, 4)
    assert series(train(config, run_dir), *EXACT, "loss_tokens") == series(alone, *EXACT, "loss_tokens")


@pytest.mark.long
def test_recall_may_begin_later(config, alone, tmp_path):
    forgetting = train(config, tmp_path / "none", 1, "gist.recall=none", STEPS)
    later = train(config, tmp_path / "later", 1, "train.stages=[{until: 4, recall: none}]", STEPS)
    assert series(later[:4], "loss") == series(forgetting[:4], "loss")
    assert [("unfolded_tokens" in m) for m in later] == [False] * 4 + [True] * 4
    assert later[4]["loss"] != forgetting[4]["loss"]
    assert series(forgetting, "loss_tokens") == series(alone, "loss_tokens")


@pytest.mark.long
@pytest.mark.parametrize("settings", [["model.attention=dense"], ["gist.recall=all"]], ids=["dense", "all"])
def test_other_kinds_of_attention_learn_the_same_answers(config, alone, tmp_path, settings):
    metrics = train(config, tmp_path / "run", 1, "train.steps=3", *settings)
    assert series(metrics, "loss_tokens", "samples") == series(alone[:3], "loss_tokens", "samples")


def test_recall_of_suffixes_needs_shards_that_have_them(config, tiny):
    plain = load_config(config, [f"data.train=[{tiny.train}]"])
    with pytest.raises(UserError, match="gist.recall: suffix, but no shard of data.train says where a suffix begins"):
        open_inputs(plain)
    assert open_inputs(load_config(config)).train.source.supervised


@pytest.mark.long
def test_a_tuned_run_answers_from_a_context(config, tmp_path):
    """The prompt that the plain template makes goes through generation."""
    run_dir = tmp_path / "run"
    train(config, run_dir, 1, "train.steps=2")
    (tmp_path / "context.txt").write_text("Polk went to Ohio in the year 1844.")
    prompt = "\n\nQuestion: Where did Polk go?\nAnswer:\n"
    done = module(
        "pretrain", "generate", "--run-dir", run_dir, "--context-file", tmp_path / "context.txt", "--prompt", prompt,
        "--max-new-tokens", "4",
    )  # fmt: skip
    assert done.stdout.startswith(prompt)
