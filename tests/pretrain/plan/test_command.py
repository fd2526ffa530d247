"""`python -m pretrain plan`: the shipped layouts, what does not fit, stages, and wrong calls."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.pretrain.plan.samples import CONFIGS, header_command
from unfold.pretrain.command import main
from unfold.pretrain.config import load_config
from unfold.pretrain.errors import UserError
from unfold.pretrain.plan.hardware import GIB, Cluster, find_gpu
from unfold.pretrain.plan.make import Planner
from unfold.pretrain.plan.work import count_parameters

# Those of real size; second stages (-recall, -linked) have the layout of the first ones.
SHIPPED = [
    str(p.relative_to(CONFIGS).with_suffix(""))
    for p in sorted(CONFIGS.rglob("*.yaml"))
    if p.stem != "tiny" and not p.stem.endswith(("-recall", "-linked"))
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_layouts_fit_their_clusters(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(header_command(CONFIGS / f"{name}.yaml")) == 0
    text = capsys.readouterr().out
    for part in (
        "layout: pipeline",
        "parameters: ",
        "activations",
        "sent by one GPU",
        "useful FLOPs = 6 x",
        "matrix products",
        "raw tokens/s",
    ):
        assert part in text


# Of the released checkpoints, by their model cards, in billions; four gist rows are within the rounding.
SIZES = {
    "paper/llama-3.2-1b": 1.24,
    "routed/qwen2-7b": 7.62,
    "llama-3.1-8b": 8.03,
    "llama-3.1-8b-1m": 8.03,
    "llama-3.1-70b": 70.6,
}


@pytest.mark.parametrize("name,billions", SIZES.items())
def test_shipped_models_have_their_size(name, billions):
    assert count_parameters(load_config(CONFIGS / f"{name}.yaml").model).total / 1e9 == pytest.approx(billions, rel=0.005)


def test_recipes_of_the_paper_take_every_ratio():
    """The page names every recipe, and the setting of every ratio; with each setting each recipe loads."""
    page = (ROOT / "docs" / "paper.md").read_text()
    ratios = re.findall(r"`(gist\.chunk_sizes=\[[\d,]+\])`", page)
    recipes = sorted((CONFIGS / "paper").glob("*.yaml"))
    assert len(recipes) == 6 and all(f"`{path.name}`" in page for path in recipes)
    found = {load_config(path, [ratio]).gist.chunk_sizes for path in recipes for ratio in ratios}
    assert found == {(8,), (16,), (32,), (4, 4), (8, 4)}
    linked = load_config(CONFIGS / "paper" / "llama-3.2-1b-linked.yaml")
    assert linked.data.shuffle_parts and linked.gist.links == 5 and linked.gist.recall == "suffix"


def planner(gpus=8, gpu="A100-40GB", memory=None) -> Planner:
    return Planner(Cluster(find_gpu(gpu, memory), gpus, 8))


@pytest.mark.parametrize("overrides", [[], ["train.micro_batch=16"], ["parallel.zero=1", "data.raw_tokens=16384"]])
def test_what_does_not_fit_is_refused_with_settings_that_would_do(overrides):
    path = CONFIGS / "paper" / "llama-3.2-1b.yaml"
    small = planner(memory=24)
    with pytest.raises(UserError) as error:
        small.check_fits(small.plan(load_config(path, overrides)))
    text = str(error.value)
    changes = re.search(r"; set (.*)$", text)[1].split()
    assert "does not fit" in text and "\n" not in text and changes
    small.check_fits(small.plan(load_config(path, [*overrides, *changes])))


STAGES = "[{until: 100, name: short, raw_tokens: 1024, global_batch: 512}, {until: 300, raw_tokens: 8192}]"


def test_every_stage_is_planned_and_the_largest_shown(capsys):
    path = CONFIGS / "paper" / "llama-3.2-1b.yaml"
    settings = [f"train.stages={STAGES}", "train.steps=1000"]
    assert main(["plan", "--config", str(path), "--set", *settings, "--gpus", "8", "--gpu", "H100-80GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    config, plans = load_config(path, settings), planner(gpu="H100-80GB")
    for line, stage in zip(lines[1:4], config.stages):
        plan = plans.plan(stage.config)
        assert line.startswith(stage.title) and f"{plan.fullest.total / GIB:.1f} " in line and f"{plan.time.total:,.2f}" in line
    assert lines[5].startswith("stage 2 needs the most memory") and any("days for 200 steps" in line for line in lines)
    assert f"all of them: {100 * 512 * 1024 + 200 * 128 * 8192 + 700 * 128 * 4096:,} raw tokens" in lines[4]


@pytest.mark.parametrize(
    "stages,gpu,said",
    [
        (STAGES, "A100-40GB", "error: stage 2: does not fit:"),
        (
            "[{until: 5, name: a, global_batch: 12, micro_batch: 1}]",
            "H100",
            "error: stage 1 (a): train.stages.0.global_batch: 12 is not",
        ),
        (  # what it sets itself is to be changed there
            "[{until: 5, global_batch: 512, micro_batch: 64}]",
            "A100-40GB",
            "set train.stages.0.micro_batch=",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_named(capsys, stages, gpu, said):
    path = CONFIGS / "paper" / "llama-3.2-1b.yaml"
    assert main(["plan", "--config", str(path), "--set", f"train.stages={stages}", "--gpus", "8", "--gpu", gpu]) == 1
    assert said in capsys.readouterr().err


def test_host_memory_that_does_not_suffice_is_refused_with_what_would_do():
    path = CONFIGS / "llama-3.1-8b.yaml"
    settings = ["train.activation_checkpointing=selective", "train.offload_activations=true"]
    for host, change in ((50, "train.activation_checkpointing=full"), (10, "train.offload_activations=false")):
        plans = Planner(Cluster(find_gpu("H100-80GB", None), 16, 8, host * GIB))
        with pytest.raises(UserError, match=f"GiB of host memory are needed on a node, {host}.0 are there .*; set {change}$"):
            plans.check_fits(plans.plan(load_config(path, settings)))
        plans.check_fits(plans.plan(load_config(path, [*settings, change])))


def test_memory_falls_with_every_setting_that_saves_it():
    path, plans = CONFIGS / "llama-3.1-8b.yaml", planner(16, "H100-80GB")
    total = lambda *settings: plans.plan(load_config(path, settings)).fullest.total
    assert total("parallel.zero=3") < total() < total("parallel.zero=1")
    assert total() < total("train.activation_checkpointing=selective") < total("train.activation_checkpointing=none")
    long = "data.raw_tokens=131072", "parallel.context=1"  # else the loss needs more than a layer
    assert total(*long, "train.mlp_tiles=8") < total(*long, "train.mlp_tiles=2") < total(*long)
    hosted = plans.plan(load_config(path, ["train.offload_activations=true"])).fullest
    assert hosted.total < total() and hosted.host > 0
    assert total("parallel.tensor=2") < total() and total("parallel.context=2", "parallel.tensor=1") > total()
    assert total("parallel.tensor=2", "parallel.sequence=true") < total("parallel.tensor=2")
    assert total() < total("distill.logits=1") < total("distill.logits=1", "distill.hidden=1")
    offloaded = plans.plan(load_config(path, ["parallel.offload=optimizer"]))
    assert offloaded.fullest.total < total() and offloaded.fullest.host > 0
    # Short sequences: the last stage's loss needs more than a layer.
    stages = ["parallel.pipeline=4", "parallel.context=1", "parallel.zero=1", "data.raw_tokens=8192"]
    pipeline = plans.plan(load_config(path, stages))
    first, *_, last = pipeline.memory
    assert first.activations > last.activations and last.working > first.working


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--gpus", "8"], "--gpu: name one of"),
        (["--gpus", "8", "--gpu", "H10"], "--gpu H10: not known; did you mean H100-80GB?"),
        (["--gpus", "12", "--gpu", "H100"], "--gpus 12: is not a whole number of nodes of 8; 16 would do"),
        (["--gpus", "8", "--gpu", "H100", "--network", "-2"], "--network -2: is not above 0"),
        (["--gpus", "8", "--gpu", "H100", "--set", "parallel.tensor=3"], "3 does not divide model.kv_heads (8); 2 would do"),
        (["--gpus", "2", "--gpu", "H100", "--set", "parallel.tensor=4"], "does not divide --gpus 2; 4 GPUs would do"),
        (["--gpus", "8", "--gpu", "H100", "--set", "train.global_batch=12"], "train.global_batch: 12 is not a multiple"),
        (["--gpus", "8", "--gpu", "H100", "--set", "model.vocab_size=0"], "give --set model.vocab_size=N"),
        (["--gpus", "1", "--gpu-memory", "4"], "does not fit: "),
    ],
)
def test_wrong_calls_end_in_one_line(arguments, message, capsys):
    assert main(["plan", "--config", str(CONFIGS / "paper" / "llama-3.2-1b.yaml"), *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_gpu_of_which_only_the_memory_is_known(capsys):
    cluster = ["--gpus", "1", "--gpu-memory", "16"]
    assert main(["plan", "--config", str(CONFIGS / "tiny.yaml"), "--set", "model.vocab_size=4096", *cluster]) == 0
    text = capsys.readouterr().out
    assert "the GPU's peak is not known" in text and f"of {16:.1f}" in text and find_gpu(None, 16).memory == 16 * GIB


@pytest.mark.parametrize("path", [p for p in sorted(CONFIGS.rglob("*.yaml"))], ids=lambda p: p.stem)
def test_shipped_configurations_are_right(path):
    """Every one is read without a complaint, and a second stage has the model of the first."""
    config = load_config(path, ["model.vocab_size=4096"] if path.stem == "tiny" else [])
    if path.stem.endswith("-recall"):
        first = load_config(path.with_name(path.name.replace("-recall", "")))
        assert config.model == first.model and config.gist.chunk_sizes == first.gist.chunk_sizes
        assert (config.gist.recall, config.optimizer.lr) == ("suffix", first.optimizer.lr / 2)
