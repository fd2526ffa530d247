"""Plans against what is real: parameters, saved activations, engines' buffers, FLOPs, keys, ranks; and the shipped layouts."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.parallel_state import RankGenerator
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import ROOT, run
from tests.live_memory import LiveMemory
from tests.pretrain.engine_bytes import LAYOUTS, OF_FOUR, run_config
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.gist import build_layout, interleave
from unfold.model.layers import BuildContext
from unfold.model.recompute import Recompute
from unfold.model.transformer import Transformer
from unfold.model.visibility import IGNORED, MicroBatch
from unfold.pretrain import parallel as parallel_groups
from unfold.pretrain.command import main
from unfold.pretrain.config import ParallelConfig, RunConfig, load_config, parse_config
from unfold.pretrain.errors import UserError
from unfold.pretrain.plan.activations import Activations
from unfold.pretrain.plan.hardware import GIB, Cluster, find_gpu
from unfold.pretrain.plan.make import Planner
from unfold.pretrain.plan.memory import model_states, spared_by_muon
from unfold.pretrain.plan.ranks import Division
from unfold.pretrain.plan.traffic import plan_traffic
from unfold.pretrain.plan.work import count_flops, count_parameters, measure_sample

CONFIGS = ROOT / "launch" / "configs"
# Those of real size; second stages (-recall, -linked) have the layout of the first ones.
SHIPPED = [
    str(p.relative_to(CONFIGS).with_suffix(""))
    for p in sorted(CONFIGS.rglob("*.yaml"))
    if p.stem != "tiny" and not p.stem.endswith(("-recall", "-linked"))
]
TOLERANCE = 0.02  # of every formula that is compared with a measurement; "about 10 %" would hide a forgotten term
BATCH = 2

SHAPES = {
    "wide heads": ModelConfig(256, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn_size=96),
    "many layers": ModelConfig(384, hidden_size=48, layers=4, heads=6, kv_heads=6, ffn_size=200, tied_embeddings=False),
    "kernel": ModelConfig(128, hidden_size=64, layers=1, heads=2, kv_heads=1, head_dim=64, ffn_size=64),
    "biases": ModelConfig(128, hidden_size=96, layers=3, heads=6, kv_heads=2, ffn_size=64, qkv_bias=True),
    "head norms": ModelConfig(128, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn_size=96, qk_norm=True),
    "all biases": ModelConfig(
        128, hidden_size=64, layers=3, heads=4, kv_heads=2, ffn_size=96, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
}


@pytest.fixture(scope="module")
def build() -> BuildContext:
    """One process that is its own tensor-parallel group."""
    return BuildContext(parallel_groups.initialize(ParallelConfig()).tensor_group, 1)


def configuration(model: ModelConfig, precision="fp32", raw=195, **train) -> RunConfig:
    """raw: three sinks and whole groups, so that the sample is as long as it can get and nothing is padded."""
    plain = parse_config({"data": {"train": ["x"], "tokenizer": "t"}, "precision": precision})
    model, data = replace(model, max_position=max(model.max_position, raw)), replace(plain.data, raw_tokens=raw)
    return replace(plain, model=model, data=data, gist=GistConfig((4, 2)), train=replace(plain.train, **train))


def micro_batch(config: RunConfig, samples: int) -> MicroBatch:
    """Samples of one document each, in which every token starts a word, as plans assume."""
    vocabulary, gist, raw = config.model.vocab_size, config.gist, config.data.raw_tokens
    ids = np.random.default_rng(0).integers(0, vocabulary - gist.levels, raw)
    level, doc = np.full(raw, -1), np.zeros(raw, np.int64)
    if config.model.attention == "gist":
        starts = np.ones(vocabulary, bool)
        made = interleave(ids, [raw], starts, gist, range(vocabulary - gist.levels, vocabulary))
        ids, level, doc = made.ids, made.level, made.doc
    else:
        gist = GistConfig((raw,))
    ids, level, doc = (torch.from_numpy(x)[None].repeat(samples, 1) for x in (ids, level, doc))
    return MicroBatch(ids, torch.where(level < 0, ids, IGNORED), build_layout(level, doc, gist))


def saved_bytes(model: Transformer, batch: MicroBatch) -> int:
    """What autograd keeps of a forward pass, every storage once, parameters not."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(batch)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpointing,tiles", [("none", 1), ("full", 1), ("selective", 1), ("none", 4), ("selective", 4)])
@pytest.mark.parametrize("precision,attention", [("fp32", "gist"), ("bf16", "gist"), ("fp32", "dense"), ("bf16", "dense")])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_those_that_autograd_saves(build, shape, precision, attention, checkpointing, tiles):
    shaped = replace(SHAPES[shape], attention=attention)
    config = configuration(shaped, precision, micro_batch=BATCH, activation_checkpointing=checkpointing, mlp_tiles=tiles)
    kept_by = replace(build, recompute=Recompute(checkpointing, mlp_tiles=tiles))
    model = Transformer(shaped, kept_by).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    kept = Activations.of(config, measure_sample(config), gpu=False)
    per_layer = {"none": kept.layer, "full": kept.residual, "selective": kept.selective}[checkpointing]()
    expected = shaped.layers * per_layer + kept.shared() + kept.norm() + kept.loss()
    # Checkpointed layers hold the rotary factors as an argument, which autograd does not see.
    unseen = 4 * shaped.head_dim * kept.tokens if checkpointing != "none" else 0
    assert expected - unseen == pytest.approx(saved_bytes(model, micro_batch(config, BATCH)), rel=TOLERANCE)


@pytest.mark.parametrize("samples", [1, BATCH])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("kinds", [("gist", "dense"), ("gist", "window:20")], ids=str)
def test_activations_of_layers_of_several_kinds(build, kinds, checkpointing, samples):
    model = replace(SHAPES["wide heads"], layer_attention=kinds)
    config = configuration(model, micro_batch=samples, activation_checkpointing=checkpointing)
    model = Transformer(model, replace(build, recompute=Recompute(checkpointing)))
    kept = Activations.of(config, measure_sample(config), gpu=False)
    per_layer = kept.layer() if checkpointing == "none" else kept.selective()
    expected = model.config.layers * per_layer + kept.shared() + kept.norm() + kept.loss()
    unseen = 4 * model.config.head_dim * kept.tokens if checkpointing != "none" else 0
    assert expected - unseen == pytest.approx(saved_bytes(model, micro_batch(config, samples)), rel=TOLERANCE)


@pytest.mark.parametrize("tiles", [4, 16])
@pytest.mark.parametrize("dtype,precision", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_a_tile_needs_what_the_plan_says(build, dtype, precision, tiles):
    """The most bytes that the tiled layer needs in backward beside its input, its output and the output's gradient."""
    model = replace(SHAPES["kernel"], ffn_size=256)
    config = configuration(model, precision, raw=4091, mlp_tiles=tiles)
    kept = Activations.of(config, measure_sample(config), gpu=False)
    layer = Transformer(model, replace(build, recompute=Recompute(mlp_tiles=tiles))).layers[0].mlp.to(dtype)
    x = torch.randn(kept.tokens, 1, model.hidden_size, dtype=dtype, requires_grad=True)
    with LiveMemory() as memory:
        out = layer(x)
        grad = torch.ones_like(out)
        before, memory.peak = memory.now, 0
        out.backward(grad)
    assert kept.tile() == pytest.approx(memory.peak - before, rel=0.03)


SAVED_BY_TRITON = """
import torch
from unfold.kernels.compressed import compressed_attention
from tests.pretrain.test_plan import configuration, micro_batch, SHAPES
config = configuration(SHAPES["kernel"], raw=51)
layout = micro_batch(config, 2).layout
q, k, v = (torch.randn(2, layout.level.shape[1], heads, 64, requires_grad=True) for heads in (2, 1, 1))
kept = {}
def pack(x):
    kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
    return x
with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
    compressed_attention(q, k, v, layout.intervals, backend="triton")
print("BYTES", sum(storage.nbytes() for storage in kept.values()))
"""


def test_the_gpu_kernel_saves_what_the_plan_says():
    """In Triton's interpreter, which needs a process of its own."""
    done = run(sys.executable, "-c", SAVED_BY_TRITON, env={**os.environ, "TRITON_INTERPRET": "1"})
    measured = int(re.search(r"BYTES (\d+)", done.stdout)[1])
    config = configuration(SHAPES["kernel"], raw=51, micro_batch=2)
    kept = Activations.of(config, measure_sample(config))
    copied = kept.element * 2 * 64 * kept.tokens  # the output once more, as the input of the projection after it
    assert kept.attention() - copied == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_flops_are_those_of_the_model(build, shape):
    model, config = Transformer(SHAPES[shape], build), configuration(SHAPES[shape])
    assert count_parameters(config.model).total == sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        model(micro_batch(config, BATCH)).backward()
    counts = counter.get_flop_counts()["Global"]
    measured = counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]  # the head's gradient is summed over chunks
    flops = count_flops(config.model, measure_sample(config), BATCH)
    assert flops.matrices + flops.head == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("chunk_sizes", [(4, 2), (8,), (2, 2, 2)])
def test_visible_keys_are_counted_exactly(chunk_sizes):
    config = replace(configuration(SHAPES["biases"], raw=150), gist=GistConfig(chunk_sizes))
    layout = micro_batch(config, 1).layout
    sample = measure_sample(config)
    assert sample.keys == int(layout.intervals.dense_mask().sum()) and sample.tokens == layout.level.shape[1]
    dense = measure_sample(replace(config, model=replace(config.model, attention="dense")))
    assert dense.keys == 150 * 151 // 2 and dense.tokens == 150


def test_neighbours_that_trade_heads_are_counted_as_one_rank_of_the_others():
    """A quarter of the heads of a part four times as long: as many rows of keys, and as much is sent to each part."""
    alone = configuration(replace(SHAPES["biases"], heads=8, kv_heads=4), raw=1024)
    of_two, both = (
        measure_sample(replace(alone, parallel=ParallelConfig(context=2 * heads, context_heads=heads))) for heads in (1, 4)
    )
    assert (both.near, both.sent, both.key_rows) == tuple(-(-n // 4) for n in (of_two.near, of_two.sent, of_two.key_rows))
    assert both.keys == of_two.keys and both.imbalance == of_two.imbalance


@pytest.mark.parametrize("method", ["gists", "ulysses"])
def test_layers_of_several_kinds_are_counted_by_their_kind(method):
    """Pairs are the mean over layers; a dense layer sends all raw tokens that others see, a window what reaches over borders."""
    kinds = ("gist", "dense", "window:20", "gist")
    alone = configuration(replace(SHAPES["many layers"], layer_attention=kinds), raw=1024)
    parallel = replace(alone.parallel, context=2, context_method=method)
    config = replace(alone, parallel=parallel)
    layout = micro_batch(alone, 1).layout
    sample = measure_sample(config)
    pairs = [int(layout.in_layer(kind).intervals.dense_mask().sum()) for kind in kinds]
    assert measure_sample(alone).keys == pytest.approx(sum(pairs) / 4, abs=1)
    assert sample.keys == pytest.approx(sum(pairs) / 4, abs=1)
    sent = {kind: size.sent for _, kind, size in sample.layers}
    if method == "ulysses":
        assert set(sent.values()) == {0}
    else:
        assert sent["dense"] > 3 * sent["gist"] and sent["window:20"] <= 4 * (20 + 3)
        assert sample.sent == pytest.approx((2 * sent["gist"] + sent["dense"] + sent["window:20"]) / 4, abs=1)


def test_flops_of_attention_are_those_of_dense_attention_when_everything_is_seen():
    """12 x heads x head_dim per pair: two products of 2 x head_dim FLOPs, forward once and backward twice."""
    config = configuration(replace(SHAPES["biases"], attention="dense"))
    scores = torch.zeros(config.data.raw_tokens, 16), torch.zeros(16, config.data.raw_tokens)
    with FlopCounterMode(display=False) as counter:
        scores[0] @ scores[1]
    square = counter.get_total_flops() * 2 * 3 * 6 * 3  # two products, three passes, six heads, three layers
    assert count_flops(config.model, measure_sample(config), 1).attention == pytest.approx(square / 2, rel=TOLERANCE)


def test_state_and_traffic_are_those_of_real_engines():
    """ZeRO 1, 2, 3 and tensor parallel on two ranks: weights, gradients, optimizer; parameters of tensor and pipeline ranks."""
    ranks = engine_bytes(2)
    for layout in LAYOUTS:
        config = run_config(layout)
        division = Division.of(config, 2)
        for rank, measured in enumerate(results[layout] for results in ranks):
            stage = division.place(rank)[0]
            counts = count_parameters(config.model, division.tensor, stage, division.pipeline)
            parameters = counts.total
            assert parameters == measured["parameters"], (layout, rank)
            if division.pipeline * division.context > 1:
                continue
            states = model_states(config, division.replicas)
            for name in ("weights", "gradients", "optimizer"):
                expected = getattr(states, name) * parameters
                if name == "optimizer":
                    expected -= spared_by_muon(config, counts, division.replicas)
                assert expected == pytest.approx(measured[name], rel=TOLERANCE), (layout, rank, name)
    traffic_is_as_planned(LAYOUTS, ranks)


@pytest.mark.long
def test_traffic_of_ranks_that_trade_heads_is_as_planned():
    """Four ranks: pairs of neighbours that trade heads, and exchange gists; and pairs that only trade heads."""
    traffic_is_as_planned(OF_FOUR, engine_bytes(4))


def engine_bytes(count: int) -> list[dict]:
    """What each of so many ranks measured, by layout."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = run(*command, "-m", "tests.pretrain.engine_bytes", timeout=300)
    return json.loads(re.search(r"RESULT (.*)", done.stdout)[1])


def traffic_is_as_planned(layouts: Iterable[str], ranks: list[dict]) -> None:
    for layout in layouts:
        config = run_config(layout)
        division = Division.of(config, len(ranks))
        kinds = plan_traffic(config, measure_sample(config), division.replicas, division.micro_batches, len(ranks))
        # ZeRO-3 keeps parameters as small as these whole: only their update is gathered here.
        expected = sum(kind.sent for kind in kinds if not kind.kind.startswith("ZeRO-3 parameters"))
        left_out = "all_gather_into_tensor" if config.parallel.zero == 3 else ""
        measured = max(sum(n for name, n in results[layout]["sent"].items() if name != left_out) for results in ranks)
        # Beside these a few numbers per step and token are summed: of norms and of the loss.
        assert expected == pytest.approx(measured, rel=0.03), (layout, kinds)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (1, 4, 2, 1), (4, 1, 3, 2)])
def test_ranks_stand_where_megatron_puts_them(sizes):
    tensor, context, data, pipeline = sizes
    division = Division(tensor, context, data, pipeline, 1)
    groups = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    for axis, kind in enumerate(("pp", "dp", "cp", "tp")):
        for group in groups.get_ranks(kind):
            places = [division.place(rank) for rank in group]
            assert [p[axis] for p in places] == list(range(len(group)))
            assert len({p[:axis] + p[axis + 1 :] for p in places}) == 1


def header_command(path: Path) -> list[str]:
    """The command that a configuration's comment gives."""
    return re.search(r"python -m pretrain (plan .*)", path.read_text())[1].split()


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
