"""Training with linked contexts: whole runs under several layouts, with recall and the routing loss, resumed, dense."""

import pytest

from tests.integration.runs import series, train, train_until_killed
from tests.integration.test_train import EXACT
from tests.parallel.test_layouts import LAYOUTS
from tests.supervised import add_links, make_linked_shard

SHORT = ("cp2", "pp2")
LONG = ("dp2 zero1", "dp2 zero3", "tp2 sequence", "ulysses2", "tp2 pp2", "cp2 tp2 sequence", "cp2 pp2", "pp2 checkpointing",
        "cp2 ulysses2")  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """Answers from linked documents, in orders that are drawn; suffixes recall, and their routing is taught."""
    root = tmp_path_factory.mktemp("linked")
    tokenizer = add_links(tiny, root / "tokenizer")
    shards, valid = make_linked_shard(tokenizer, root / "train", 80), make_linked_shard(tokenizer, root / "valid", 12, seed=1)
    gist = {"chunk_sizes": [4, 2], "recall": "suffix", "links": 3, "topk": 3, "route_loss": 1.0, "route_queries": 20}
    data = {"train": [str(shards)], "valid": [str(valid)], "tokenizer": str(tokenizer), "raw_tokens": 256, "shuffle_parts": True}
    return tiny.config(root / "c.yaml", gist=gist, data=data, train={"steps": 6, "valid_every": 3})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("alone") / "run")


def assert_same(metrics: list[dict], alone: list[dict]) -> None:
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        for name in ("route_loss", "valid_loss"):
            assert (name in got) == (name in want)
            assert got.get(name, 0) == pytest.approx(want.get(name, 0), rel=2e-6)
        assert got["loss_tokens"] == want["loss_tokens"]


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
def test_a_layout_gives_the_losses_of_one_process(name, config, alone, tmp_path):
    ranks, settings = LAYOUTS[name]
    assert_same(train(config, tmp_path / "run", ranks, *settings), alone)


def test_it_learns_and_recalls(alone):
    assert alone[-1]["valid_loss"] < alone[2]["valid_loss"]
    assert all(m["unfolded_tokens"] > 0 and m["route_loss"] > 0 for m in alone)


@pytest.mark.long
def test_a_killed_run_writes_the_same_losses(config, alone, tmp_path):
    run_dir = tmp_path / "run"
    train_until_killed(config, run_dir, 1, 3)
    assert series(train(config, run_dir), *EXACT, "loss_tokens") == series(alone, *EXACT, "loss_tokens")


@pytest.mark.long
@pytest.mark.parametrize("name", ["pp2", "ulysses2"])
def test_dense_attention_learns_the_same_answers(config, alone, tmp_path, name):
    """A dense model reads each part alone, too, and needs no links."""
    ranks, settings = LAYOUTS[name]
    dense = ["model.attention=dense", "gist.route_loss=0"]
    want = train(config, tmp_path / "one", 1, *dense)
    assert series(want, "loss_tokens", "samples") == series(alone, "loss_tokens", "samples")
    assert_same(train(config, tmp_path / "two", ranks, *settings, *dense), want)


@pytest.mark.long
def test_every_token_may_recall(config, tmp_path):
    """Tokens of parts recall within their part."""
    settings = ["gist.recall=all", "gist.own_group=true", "gist.route_far=true", "gist.topk=2", "train.steps=3"]
    want = train(config, tmp_path / "one", 1, *settings)
    assert_same(train(config, tmp_path / "two", 2, "parallel.context=2", *settings), want)


@pytest.mark.long
def test_dense_attention_teaches_within_parts(config, tmp_path):
    """Distillation: the teacher's parts keep to themselves, too."""
    settings = ["distill.logits=1", "distill.hidden=0.1", "train.steps=3"]
    want = train(config, tmp_path / "one", 1, *settings)
    assert all(m["distill_logits"] > 0 for m in want)
    got = train(config, tmp_path / "two", 2, "parallel.context=2", *settings)
    assert_same(got, want)
    for a, b in zip(got, want, strict=True):
        # A difference of log-probabilities of size 6, whose rounding does not shrink with it.
        assert a["distill_logits"] == pytest.approx(b["distill_logits"], abs=1e-7)
