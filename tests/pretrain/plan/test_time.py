"""What a plan says of time, against what was measured: operations as they run, times of a GPU."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from tests.conftest import ROOT
from tests.pretrain.plan.samples import CONFIGS, DTYPES, SHAPES, built, configuration, header_command, micro_batch
from unfold.model.config import ModelConfig
from unfold.model.layers import BuildContext
from unfold.model.loss import Targets, token_loss_sum
from unfold.model.parallel.division import Division
from unfold.pretrain.command import main
from unfold.pretrain.config import RunConfig, load_config, parse_config
from unfold.pretrain.plan import rates
from unfold.pretrain.plan.activations import Activations
from unfold.pretrain.plan.hardware import Cluster, find_gpu
from unfold.pretrain.plan.make import Plan, Planner
from unfold.pretrain.plan.moved import Moved
from unfold.pretrain.plan.pointwise import Pointwise, count_layer, loss_bytes
from unfold.pretrain.plan.roofline import product_flops
from unfold.pretrain.plan.work import measure_sample

GPU_FILES = ROOT / "docs" / "benchmarks" / "gpu"


KEEPING = [("none", 1), ("none", 4), ("full", 1), ("full", 4), ("selective", 4)]


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


@pytest.mark.parametrize("name,recall", [("forgetting", "none"), ("recalling", "all"), ("dense", "none")])
def test_a_step_takes_little_more_than_its_parts(name, recall):
    """Of a run on one H200, which also starts kernels, waits for the host, and was made before attention was tuned."""
    run = json.loads((GPU_FILES / "h200_train.json").read_text())
    config = parse_config(run["config"] | {"data": {"train": ["x"], "tokenizer": "t", "raw_tokens": 32768}})
    model = replace(config.model, vocab_size=32768, attention="dense" if name == "dense" else "gist")
    config = replace(config, model=model, gist=replace(config.gist, recall=recall))
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
