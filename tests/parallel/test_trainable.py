"""What is trained: rows of gists alone, adapters, rates of their own: the same under every layout, and whole in a checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.integration.runs import series, train
from unfold.model.lora import Fused
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.config import load_config
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.train.trainable import check_trainable, is_trained, parameter_names

GISTS = ["train.trainable=gists"]
LORA = ["lora.rank=4", "lora.targets=[q_proj, v_proj, o_proj, gate_proj, up_proj]", "train.trainable=[gists, '*norm*']"]
LORA_ALONE = ["lora.rank=3", "lora.targets=[k_proj, up_proj, down_proj]", "lora.rslora=true"]
STEPS = 4


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("trainable") / "c.yaml"
    train = {"steps": STEPS, "valid_every": 0, "valid_samples": 1}
    return tiny.config(path, train=train, checkpoint={"every": 2}, data={"raw_tokens": 64}, optimizer={"lr": 1e-2})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """way -> (run directory, metrics) of one process, made once."""
    made = {}

    def run(*settings):
        if settings not in made:
            run_dir = tmp_path_factory.mktemp("alone") / "run"
            made[settings] = run_dir, train(config, run_dir, 1, *settings)
        return made[settings]

    return run


def close(got, want):
    for a, b in zip(got, want, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2e-6 * b["loss"]
        assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-5 * b["grad_norm"]


def weights(run_dir, step=STEPS):
    tensors = TensorDirectory(run_dir / "checkpoints" / f"step-{step:08d}")
    return {name: tensors.read(name) for name in tensors.shapes if not name.startswith("rng")}


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "way,ranks,layout",
    [
        (GISTS, 2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (GISTS, 2, ["parallel.pipeline=2"]),
        (LORA, 2, ["parallel.tensor=2", "parallel.sequence=true", "train.mlp_tiles=2"]),
        (LORA, 2, ["parallel.zero=3", "train.activation_checkpointing=full"]),
        (LORA_ALONE, 2, ["parallel.pipeline=2"]),
        long(GISTS, 2, ["parallel.zero=2"]),
        long(GISTS, 2, ["parallel.zero=3"]),
        long(LORA, 2, ["parallel.tensor=2"]),
        long(LORA, 2, ["parallel.context=2"]),
        long(LORA, 2, ["parallel.zero=2", "parallel.offload=none"]),
        long(LORA, 4, ["parallel.tensor=2", "parallel.pipeline=2"]),
        long(LORA_ALONE, 2, ["parallel.tensor=2", "train.activation_checkpointing=selective"]),
        long([*GISTS, "model.tied_embeddings=false"], 2, ["parallel.tensor=2"]),
        long([*GISTS, "model.tied_embeddings=false"], 2, ["parallel.pipeline=2"]),
    ],
)
def test_a_layout_gives_the_losses_of_one_process(config, alone, tmp_path, way, ranks, layout):
    close(train(config, tmp_path / "run", ranks, *way, *layout), alone(*way)[1])


def test_rows_of_gists_alone_are_trained_and_the_checkpoint_is_whole(config, alone, tiny):
    run_dir, _ = alone(*GISTS)
    first, last = weights(run_dir, 2), weights(run_dir)
    ids = list(load_tokenizer(tiny.tokenizer, 0).gist_ids)
    moved = (first["model.embedding.weight"] != last["model.embedding.weight"]).any(1).nonzero()[:, 0].tolist()
    assert set(moved) <= set(ids) and {ids[0], ids[1]} <= set(moved)  # of the levels in use, and by the softmax of the others
    assert all(torch.equal(first[n], last[n]) for n in last if n.startswith("model.") and n != "model.embedding.weight")
    assert {n for n in last if n.startswith("exp_avg")} == {"exp_avg.embedding.rows", "exp_avg_sq.embedding.rows"}
    assert {n.removesuffix(".0").removesuffix(".1") for n in last} >= {f"model.{n}" for n in parameter_names(load_config(config))}


def test_adapters_resume_exactly_and_under_another_layout(config, alone, tmp_path):
    run_dir, want = alone(*LORA)
    for name, ranks, layout in (("same", 1, []), ("other", 2, ["parallel.zero=3"])):
        shutil.copytree(run_dir, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / f"step-{STEPS:08d}")
        got = train(config, tmp_path / name, ranks, *LORA, *layout)
        if name == "same":
            assert series(got, "loss", "grad_norm") == series(want, "loss", "grad_norm")
        close(got, want)


def test_a_rate_of_one_changes_nothing_and_another_moves_faster(config, alone, tmp_path):
    plain_dir, plain = alone()
    close(alone("optimizer.rates=[{match: gists, factor: 1}]")[1], plain)
    # Rows that were never apart go on apart, where that is allowed.
    shutil.copytree(plain_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    more = ["optimizer.rates=[{match: [gists, '*norm*'], factor: 10}]", "train.allow_changes=[optimizer.rates]"]
    faster = train(config, tmp_path / "run", 2, *more, "parallel.zero=2")
    close(faster[:3], plain[:3])  # the third step's loss is that of the second's update
    before, slow, fast = weights(plain_dir, 2), weights(plain_dir), weights(tmp_path / "run")
    ratio = lambda n: float((fast[n] - before[n]).norm() / (slow[n] - before[n]).norm())
    assert 8 < ratio("model.final_norm.weight") < 12
    assert 0.9 < ratio("model.layers.1.mlp.down.weight") < 1.1


@pytest.mark.parametrize("ranks,layout", [(1, []), long(2, ["parallel.pipeline=2"]), long(2, ["parallel.zero=3"])])
def test_adapters_in_bf16(config, alone, tmp_path, ranks, layout):
    metrics = train(config, tmp_path / "run", ranks, *LORA, "precision=bf16", *layout)
    for got, want in zip(metrics, alone(*LORA)[1], strict=True):
        assert abs(got["loss"] - want["loss"]) <= 3e-3 * want["loss"]


@pytest.mark.parametrize(
    "settings,told",
    [
        (
            ["train.trainable=[embeding.weight]"],
            "'embeding.weight' means no parameter of this model; names are such as embedding",
        ),
        (["train.trainable=[embedding.weight, '!*']"], "leaves nothing to train"),
        (["train.trainable=['layers.0.*']", "parallel.pipeline=2"], "leaves pipeline stage 1 nothing to train"),
        (["optimizer.rates=[{match: heads, factor: 2}]"], "optimizer.rates.0.match: 'heads' means no parameter"),
        (["optimizer.rates=[{factor: 2}]"], "optimizer.rates.0.match: empty"),
        (["lora.targets=[q_proj, w_proj]"], "lora.targets.1: 'w_proj' is not one of q_proj"),
        (["lora.init_from=x"], "lora.init_from: x with rank: 0; set the adapter's rank"),
        (["lora.rank=2", "optimizer.kind=muon", "precision=bf16"], "muon needs lora.rank: 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(config, settings, told):
    with pytest.raises(UserError) as refused:
        check_trainable(load_config(config, settings), (1,))
    assert told in str(refused.value)


def test_rows_of_gists_need_gists(config):
    with pytest.raises(UserError, match="'gists' means no row, since the tokenizer has neither gists nor links"):
        check_trainable(load_config(config, ["train.trainable=[gists]"]), ())


def test_one_kv_head_is_one_tensor_of_a_checkpoint():
    """As are several: only parts that tensor parallelism splits each by itself lie apart."""
    assert [Fused(("q", "k", "v"), (16, 8, 8), groups, 32).stride([0, 1, 2]) for groups in (1, 2)] == [1, 1]
    assert Fused(("gate", "up"), (64, 64), 1, 32).stride([0, 1]) == 2


def test_patterns(config):
    def names(*patterns):
        run = load_config(config, [f"train.trainable={list(patterns)}"])
        return {name for name in parameter_names(run) if is_trained(run, name)}

    assert names("!embedding.*") == {n for n in names() if not n.startswith("embedding.")}
    assert names("*norm*") == {n for n in names() if "norm" in n} and len(names("*norm*")) == 5
    assert names("layers.*", "!layers.0.*") == {n for n in names() if n.startswith("layers.1.")}
    assert names("gists") == {"embedding.rows"}
