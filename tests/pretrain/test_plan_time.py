"""What a plan says of time and of peaks, against what was measured: operations as they run, live bytes, times of a GPU."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from tests.live_memory import LiveMemory
from tests.pretrain.test_plan import CONFIGS, SHAPES, configuration, header_command, micro_batch
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.layers import BuildContext
from unfold.model.loss import Targets, token_loss_sum
from unfold.model.parallel.division import Division
from unfold.model.recompute import Offload, Recompute
from unfold.model.transformer import Transformer
from unfold.pretrain.command import main
from unfold.pretrain.config import RunConfig, load_config, parse_config
from unfold.pretrain.plan import rates
from unfold.pretrain.plan.activations import Activations
from unfold.pretrain.plan.fused import COUNTED
from unfold.pretrain.plan.hardware import Cluster, find_gpu
from unfold.pretrain.plan.make import Plan, Planner
from unfold.pretrain.plan.memory import layers_peak
from unfold.pretrain.plan.moved import Moved
from unfold.pretrain.plan.pointwise import Pointwise, count_layer, loss_bytes
from unfold.pretrain.plan.roofline import product_flops
from unfold.pretrain.plan.work import measure_sample

GPU_FILES = ROOT / "docs" / "benchmarks" / "gpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEEPING = [("none", 1), ("none", 4), ("full", 1), ("full", 4), ("selective", 4)]


class Kernel(torch.autograd.Function):
    """Stands for the GPU's attention kernel: keeps what that keeps, makes the gradients that it makes, computes nothing."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        sorted_rows = (x.new_empty(x.shape[0], rows, *x.shape[2:]) for x in (k, v))
        statistics = [q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2 if q.dtype == torch.float32 else 1)]
        ctx.save_for_backward(q, *sorted_rows, out, *statistics)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *_ = ctx.saved_tensors
        return torch.zeros_like(q), *(x.new_zeros(q.shape[0], q.shape[1], *x.shape[2:]) for x in (k, v)), None


def built(config: RunConfig, device: str = "cpu") -> Transformer:
    train = config.train
    offload = Offload() if train.offload_activations else None
    recompute = Recompute(train.activation_checkpointing, offload, train.mlp_tiles)
    with torch.device(device):
        build = replace(BuildContext.alone(), blank=device == "meta", recompute=recompute)
        model = Transformer(config.model, replace(build, pointwise=COUNTED) if train.fuse_pointwise else build)
    return model.to(DTYPES[config.precision])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    "layers,checkpointing,offload,tiles",
    [(2, "none", False, 1), (3, "none", False, 4), (2, "full", False, 1), (3, "full", True, 4), (6, "full", True, 4),
     (2, "selective", False, 1), pytest.param(4, "full", True, 16, marks=pytest.mark.long)],
)  # fmt: skip
def test_peaks_are_those_of_a_step(layers, checkpointing, offload, tiles, precision):
    """The most bytes that are alive in a forward and backward pass; with offload flat in layers. One case has 262,144 tokens."""
    model = ModelConfig(128, hidden_size=32, layers=layers, heads=2, kv_heads=1, head_dim=16, ffn_size=96)
    raw = 2**18 if tiles == 16 else 2**12
    config = configuration(
        model, precision, raw, activation_checkpointing=checkpointing, offload_activations=offload, mlp_tiles=tiles
    )
    config = replace(config, gist=GistConfig((8, 8, 8)))
    sample, model = measure_sample(config), built(config)
    kept = Activations.of(config, sample)
    ids = torch.zeros(1, sample.length, dtype=torch.int64)
    labels = torch.where(torch.arange(sample.length) < sample.raw, 0, -100)[None]
    with LiveMemory() as memory:
        hidden = model.run_layers(ids, ids, lambda _, *qkv: Kernel.apply(*qkv, sample.key_rows))
        loss = token_loss_sum(hidden, Targets.of(labels), model.head_weight, model.build)
        del hidden
        loss.backward()
    on_gpu, working, on_host = layers_peak(config, kept, layers)
    hosted = max(0, on_host - on_gpu)  # the host is the CPU too: what a GPU would hold of it is counted once
    assert on_gpu + kept.shared() + max(working, kept.loss_peak()) == pytest.approx(memory.peak - hosted, rel=0.03)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("checkpointing,tiles", KEEPING)
@pytest.mark.parametrize("shape", ["wide heads", "head norms", "all biases"])
def test_what_is_counted_without_memory_is_what_runs(shape, checkpointing, tiles, precision):
    """Bytes and kernels of a layer on the meta device, with a tenth of the tokens, and on the CPU; products by the formula."""
    config = configuration(SHAPES[shape], precision, 3 + 8 * 600, activation_checkpointing=checkpointing, mlp_tiles=tiles)
    kept = Activations.of(config, measure_sample(config))
    planned = Pointwise.of(config, kept)
    moved = count_layer(built(config).layers[0], config.model, 1, kept.tokens)
    assert planned == Pointwise(moved.total, sum(moved.kernels.values())) and planned.kernels > 50
    flops, again = product_flops(config, kept, 1)
    head = 6 * config.model.padded_vocab_size * config.model.hidden_size * kept.targets
    assert flops - head == moved.products and (again > 0) == (checkpointing != "none" or tiles > 1)


@pytest.mark.parametrize("checkpointing,tiles", KEEPING)
def test_compiled_functions_move_less_and_multiply_as_much(checkpointing, tiles):
    """The plan's kernels in place of the functions; each is held against the compiler in tests/model/test_pointwise.py."""
    config = configuration(SHAPES["head norms"], "bf16", 3 + 8 * 600, activation_checkpointing=checkpointing, mlp_tiles=tiles)
    kept = Activations.of(config, measure_sample(config))
    fused = replace(config, train=replace(config.train, fuse_pointwise=True))
    before, after = Pointwise.of(config, kept), Pointwise.of(fused, kept)
    assert after.bytes < before.bytes / 2 and after.kernels < before.kernels / 2
    plain, counted = (count_layer(built(c).layers[0], config.model, 1, kept.tokens) for c in (config, fused))
    assert counted.products == plain.products and counted.total == after.bytes


def test_a_sequence_that_is_split_has_less_of_the_compiled_norms():
    """Sequence parallelism over two ranks: half of the norms and additions of the residual stream."""
    config = configuration(SHAPES["wide heads"], "bf16", 3 + 8 * 600, fuse_pointwise=True)
    kept = replace(Activations.of(config, measure_sample(config)), tensor=2)
    halved = replace(kept, sequence=True)
    stream = config.model.hidden_size * kept.tokens * 2  # bytes
    # Norm 7, addition and norm 11, the last addition and the sum of two gradients 3 each.
    saved = Pointwise.of(config, kept).bytes - Pointwise.of(config, halved).bytes
    assert saved == pytest.approx(24 * stream / 2, rel=0.02)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("distilled", [False, True])
def test_the_loss_moves_what_the_plan_says(distilled, precision):
    model = ModelConfig(2048, hidden_size=256, layers=1, heads=2, kv_heads=1, tied_embeddings=False)
    config = configuration(model, precision, 4096)
    if distilled:
        config = replace(config, distill=replace(config.distill, logits=1.0))
    rows = torch.randn(4096, 1, 256, dtype=DTYPES[precision], requires_grad=True)
    weight = torch.randn(2048, 256, dtype=DTYPES[precision], requires_grad=True)
    added = None
    if distilled:
        from unfold.model.visibility import AddedLosses

        added = AddedLosses(logits=1.0, samples=(0,))
    targets = Targets.of(torch.zeros(1, 4096, dtype=torch.int64), (0,) if distilled else ())
    with Moved() as moved:
        teacher = rows.detach() if distilled else None
        token_loss_sum(rows, targets, weight, BuildContext.alone(), added, teacher).backward()
    kept = Activations.of(config, measure_sample(config, "dense"))
    assert loss_bytes(config, kept) == pytest.approx(moved.total, rel=0.03)


def measured_attention(raw: int, kind: str) -> tuple[float, float]:
    """(forward, backward) seconds of one layer's kernels, sorting of keys included."""
    found = json.loads((GPU_FILES / "h200_kernel_times.json").read_text())[f"{kind} {raw}"]
    times = {name: ms / 1e3 for name, (ms, _) in found["kernels"].items()}
    if kind == "compressed":
        forward = times["forward_kernel"] + times["vectorized_gather_kernel#0"]
        return forward, found["gpu_ms"] / 1e3 - forward
    chosen = lambda word: sum(seconds for name, seconds in times.items() if word in name)
    return chosen("flash_fwd"), chosen("flash_bwd")


@pytest.mark.parametrize("raw", [8192, 32768, 131072])
def test_attention_takes_what_was_measured(raw):
    config = load_config(CONFIGS / "llama-3.1-8b.yaml", [f"data.raw_tokens={raw}", "parallel.context=1"])
    for kind, attention, formulas, bound in (
        ("compressed", "gist", (rates.GIST_FORWARD, rates.GIST_BACKWARD), 0.07),
        ("dense SDPA", "dense", (rates.DENSE_FORWARD, rates.DENSE_BACKWARD), 0.15),
    ):
        sample = measure_sample(config, attention)
        for formula, per_pair, measured in zip(formulas, (4, 8), measured_attention(raw, kind)):
            assert formula.seconds(sample.tokens, sample.keys, 4096, per_pair) == pytest.approx(measured, rel=bound)


def plan(config: RunConfig, gpus: int = 1, gpu: str = "H200") -> Plan:
    return Planner(Cluster(find_gpu(gpu, None), gpus, 8)).plan(config)


@pytest.mark.parametrize("name,attention", [("forgetting", "gist"), ("dense", "dense")])
def test_a_step_takes_little_more_than_its_parts(name, attention):
    """Of a run on one H200, which also starts kernels, waits for the host, and was made before attention was tuned."""
    run = json.loads((GPU_FILES / "h200_train.json").read_text())
    config = parse_config(run["config"] | {"data": {"train": ["x"], "tokenizer": "t", "raw_tokens": 32768}})
    config = replace(config, model=replace(config.model, vocab_size=32768, attention=attention))
    measured = run["results"][name]["last"]["seconds"]
    assert 0.85 * measured < plan(config).time.total < measured


def test_a_rank_of_context_parallelism_has_the_pairs_of_its_queries():
    config = configuration(SHAPES["biases"], raw=3 + 8 * 15)  # 168 tokens: nothing is padded
    config = replace(config, parallel=replace(config.parallel, context=2))
    sample, intervals = measure_sample(config), micro_batch(config, 1).layout.intervals
    seen, division = intervals.dense_mask()[0].sum(-1), Division.even([intervals], 2)
    parts = [sum(int(seen[a:b].sum()) for a, b in division.spans[rank]) for rank in range(2)]
    assert sample.length == len(seen) and sample.imbalance == pytest.approx(max(parts) / (sum(parts) / 2))
    ulysses = replace(config, parallel=replace(config.parallel, context_method="ulysses"))
    assert measure_sample(ulysses).imbalance == 1


def test_a_million_tokens_on_one_node(capsys, monkeypatch):
    """It fits, and by its own arithmetic a step takes at most 40 s; dense attention stands beside it."""
    monkeypatch.chdir(ROOT)
    command = header_command(CONFIGS / "llama-3.1-8b-1m.yaml")
    assert main(command) == 0
    text = capsys.readouterr().out
    ours, dense = (float(x) for x in re.search(r"\n  seconds +([\d.]+) 100% +([\d.]+) 100%", text).groups())
    assert ours <= 40 and dense > 10 * ours
    shares = [int(x) for x in re.findall(r"\n  (?:matrix|attention|bound|communication, |waiting).* (\d+)% +[\d.]+ +\d+%", text)]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=3)
    assert main([*command, "--compare", "none"]) == 0 and " 100% " not in capsys.readouterr().out


def test_what_is_slower_takes_longer():
    config = load_config(CONFIGS / "llama-3.1-8b-1m.yaml", ["data.raw_tokens=65536"])
    time = lambda config, **cluster: Planner(Cluster(find_gpu("H100", None), 8, 8, **cluster)).plan(config).time
    first = time(config)
    assert first.total == pytest.approx(first.computing + first.exposed + first.idle)
    assert 0 < first.again < first.computing and first.hidden > 0 == first.idle
    selective = replace(config, train=replace(config.train, activation_checkpointing="selective"))
    assert time(selective).attention.again == 0 and time(selective).computing < first.computing
    two_nodes = lambda network: Planner(Cluster(find_gpu("H100", None), 16, 8, network=network)).plan(
        replace(config, train=replace(config.train, global_batch=2))
    )
    assert two_nodes(1e7).time.total > two_nodes(50e9).time.total
    pipelined = load_config(CONFIGS / "llama-3.1-70b.yaml")
    assert Planner(Cluster(find_gpu("H100", None), 128, 8)).plan(pipelined).time.idle > 0
