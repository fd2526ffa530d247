"""What a plan counts, against what is real: parameters, FLOPs, keys, ranks, and what engines hold and send."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.parallel_state import RankGenerator
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import run
from tests.pretrain.plan.engine_bytes import LAYOUTS, MORE_LAYOUTS, OF_FOUR, run_config
from tests.pretrain.plan.samples import SHAPES, TOLERANCE, configuration, micro_batch
from unfold.model.config import GistConfig
from unfold.model.gist import interleave
from unfold.model.transformer import Transformer
from unfold.pretrain.config import ParallelConfig
from unfold.pretrain.plan.memory import model_states
from unfold.pretrain.plan.ranks import Division
from unfold.pretrain.plan.traffic import plan_traffic
from unfold.pretrain.plan.trained import count_trained
from unfold.pretrain.plan.work import count_flops, count_parameters, measure_sample

BATCH = 2


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
    # What plans take a sample to be is what any document is whose chunks do not grow.
    exact = replace(config.gist, word_aware=False)
    made = interleave(np.zeros(150, np.int64), [150], np.zeros(1, bool), exact, range(1, 1 + exact.levels))
    assert measure_sample(replace(config, gist=exact)) == sample and len(made.ids) == sample.tokens
    dense = measure_sample(replace(config, model=replace(config.model, attention="dense")))
    assert dense.keys == 150 * 151 // 2 and dense.tokens == 150


@pytest.mark.parametrize("recall", ["none", "all"])
def test_neighbours_that_trade_heads_are_counted_as_one_rank_of_the_others(recall):
    """A quarter of the heads of a part four times as long: as many rows of keys, and as much is sent to each part."""
    alone = configuration(replace(SHAPES["biases"], heads=8, kv_heads=4), raw=1024)
    alone = replace(alone, gist=replace(alone.gist, recall=recall))
    of_two, both = (
        measure_sample(replace(alone, parallel=ParallelConfig(context=2 * heads, context_heads=heads))) for heads in (1, 4)
    )
    assert (both.near, both.sent, both.key_rows) == tuple(-(-n // 4) for n in (of_two.near, of_two.sent, of_two.key_rows))
    assert both.keys == of_two.keys and both.imbalance == of_two.imbalance
    recalling = [[size.recall for _, size in sample.layers if size.recall] for sample in (both, of_two)]
    assert bool(recalling[0]) == (recall == "all")
    for part, whole in zip(*recalling, strict=True):
        assert (part.queries, part.scored, part.pairs) == (whole.queries / 4, whole.scored, whole.pairs)
        assert whole.fetched / 16 <= part.fetched <= whole.fetched / 4  # a quarter of the heads wants fewer chunks


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
    sent = {kind: size.sent for kind, size in sample.layers}
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


@pytest.mark.parametrize(
    "layouts, count",
    [
        pytest.param(LAYOUTS, 2, id="few"),
        pytest.param(MORE_LAYOUTS, 2, id="more", marks=pytest.mark.long),
        pytest.param(OF_FOUR, 4, id="trading heads", marks=pytest.mark.long),
    ],
)
def test_state_and_traffic_are_those_of_real_engines(layouts, count):
    """On so many ranks: parameters of each, weights, gradients, optimizer with averages, and bytes sent in a step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = run(*command, "-m", "tests.pretrain.plan.engine_bytes", *layouts, timeout=300)
    ranks = json.loads(re.search(r"RESULT (.*)", done.stdout)[1])
    for layout in layouts:
        config = run_config(layout)
        division = Division.of(config, count)
        for rank, measured in enumerate(results[layout] for results in ranks):
            trained = count_trained(config, division.place(rank)[0])
            assert trained.held == measured["parameters"], (layout, rank)
            if division.pipeline * division.context > 1:
                continue
            states = model_states(config, trained, division.replicas)
            for name in ("weights", "gradients", "optimizer"):
                assert getattr(states, name) == pytest.approx(measured[name], rel=TOLERANCE), (layout, rank, name)
        kinds = plan_traffic(config, measure_sample(config), division.replicas, division.micro_batches, count)
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
