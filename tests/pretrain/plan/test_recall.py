"""What a plan says of recall, against selections that are made, layouts that are divided, and times of a GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from tests.kernels.uniform import uniform_tree
from tests.pretrain.plan.samples import CONFIGS, ROOT, SHAPES, configuration
from unfold.kernels.select import select_gists
from unfold.kernels.tree import GistTree
from unfold.model.config import GistConfig
from unfold.model.gist import recalling_tokens
from unfold.model.gist.recall import build_recall, select_rule
from unfold.model.parallel.division import Division
from unfold.model.parallel.fetch import Asked
from unfold.model.parallel.recall import make_recall_plan, wanted_chunks
from unfold.pretrain.command import main
from unfold.pretrain.config import RunConfig, load_config
from unfold.pretrain.errors import UserError
from unfold.pretrain.plan import rates, recall
from unfold.pretrain.plan.activations import Activations
from unfold.pretrain.plan.hardware import Cluster, find_gpu
from unfold.pretrain.plan.make import Plan, Planner
from unfold.pretrain.plan.recall import block_rows, measure_recall
from unfold.pretrain.plan.traffic import context_exchange
from unfold.pretrain.plan.work import SampleSize, lay_out, measure_sample

GPU_FILES = ROOT / "docs" / "benchmarks" / "gpu"
WIDE = 512  # of a head: queries and keys at random then have little to do with each other, and selection is chance


def by_chance(tree: GistTree, config: GistConfig, heads: int, kv_heads: int):
    """A selection in which every gist is as likely as any other."""
    torch.manual_seed(0)
    q = torch.randn(tree.queries, heads, WIDE)
    k = normalize(torch.randn(1, tree.others.tokens, kv_heads, WIDE), dim=-1)
    return select_gists(q, k, tree, select_rule(config))


@pytest.mark.parametrize(
    "chunk_sizes,settings,raw,recalling",
    [((8, 4), {}, 1536, 500), ((4, 4, 2), {}, 1024, 300), ((16,), {}, 4096, 400), ((4, 2), {"share": "group"}, 1000, 400),
     ((8, 4), {"topk": 6}, 1536, 300), ((8, 4), {"budget_ratio": 8}, 1024, 300)],
)  # fmt: skip
def test_rows_are_as_many_as_chance_makes_them(chunk_sizes, settings, raw, recalling):
    """Gists that a query's heads take together, and the raw tokens behind them."""
    config, tree = GistConfig(chunk_sizes, **settings), uniform_tree(raw, chunk_sizes, recalling)
    planned = measure_recall(tree, config, 4, 64, 0)
    selection = by_chance(tree, config, 8, 2)
    gists, chunks = sum(map(len, selection.rows)), len(selection.rows[-1])
    assert planned.read == pytest.approx((gists + chunks * chunk_sizes[0]) / recalling / 2, rel=0.03)


@pytest.mark.parametrize("settings", [{}, {"share": "group"}, {"topk": 6}, {"budget_ratio": 8}], ids=str)
@pytest.mark.parametrize("chunk_sizes", [(8, 4), (4, 4, 2), (16,)])
def test_lists_have_the_room_of_the_kernels(chunk_sizes, settings):
    pytest.importorskip("triton")
    from unfold.kernels.select.room import list_room

    config, tree = GistConfig(chunk_sizes, **settings), uniform_tree(1030, chunk_sizes, 333)
    planned, room = measure_recall(tree, config, 4, 64, 0), list_room(tree, select_rule(config), 16, 8, 2)
    assert 2 * planned.items == room.items and 2 * planned.entries == room.entries
    assert planned.candidates == 16 * max(room.rooms)
    assert 2 * planned.places == pytest.approx(int(room.start[-1]), rel=0.02)
    # Beside a row and bits of each item: where lists begin, how long they are, where places begin.
    assert planned.lists() == 8 * planned.items + planned.blocks * 16 * (len(chunk_sizes) + 1)


def test_sizes_are_those_of_the_kernels():
    pytest.importorskip("triton")
    from unfold.kernels.select import kernels, triton
    from unfold.kernels.unfold import tiles, turn

    for (dim, element), (forward, *_) in tiles.TABLE["sm_90"].items():
        assert block_rows(dim, element) == forward.rows
    assert (recall.SCRATCH, recall.UNIT) == (triton.SCRATCH, kernels.ROOM_UNIT.value)
    assert (recall.PART, recall.PLACES, recall.SPREAD) == (turn.SHORTEST_LIST, 2**27, 2**26)


def llama(raw: int, *overrides: str) -> RunConfig:
    """One GPU, without checkpointing."""
    plain = f"data.raw_tokens={raw}", "parallel.context=1", "train.activation_checkpointing=none"
    return load_config(CONFIGS / "llama-3.1-8b.yaml", [*plain, *overrides])


def recalling_layer(raw: int, part: float) -> SampleSize:
    config = llama(raw, "gist.recall=suffix" if part < 1 else "gist.recall=all")
    return measure_sample(config, suffix=part).layers[-1][1]


def added(size: SampleSize) -> float:
    """Seconds that recall adds to a layer, by the plan."""
    return rates.RECALL.seconds(size.near, size.recall.queries, size.recall.scored + size.recall.read, 32 * 128)


def test_recall_takes_what_was_measured():
    """Within 1 % of the four times that its rates were made from, and within 6 % of one that they were not: of a tenth of 131,072
    tokens, measured with other tiles; how much slower these were was measured at 32,768 tokens."""
    times = json.loads((GPU_FILES / "h200_kernel_times.json").read_text())
    more = lambda found, raw, which: (found[f"recall, {which} {raw}"]["gpu_ms"] - found[f"compressed {raw}"]["gpu_ms"]) / 1e3
    for raw in (8192, 32768):
        for which, part in (("a tenth", 0.1), ("all", 1)):
            assert added(recalling_layer(raw, part)) == pytest.approx(more(times, raw, which), rel=0.01)
    tiles = json.loads((GPU_FILES / "h200_tiles.json").read_text())
    slower = more(tiles, 32768, "a tenth") / more(times, 32768, "a tenth")
    assert added(recalling_layer(131072, 0.1)) == pytest.approx(more(tiles, 131072, "a tenth") / slower, rel=0.06)


def recalling(chunk_sizes=(4, 2), raw=3 + 8 * 40, **gist) -> RunConfig:
    plain = configuration(SHAPES["wide heads"], raw=raw)
    return replace(plain, gist=GistConfig(chunk_sizes, recall="all", **gist))


@pytest.mark.parametrize("chunk_sizes", [(4, 2), (8,), (2, 2, 2)])
def test_what_unfolds_everything_is_counted_exactly(chunk_sizes):
    """Pairs of a layer in which all raw tokens see all that is before them; of half of the samples, half of what that adds."""
    config = recalling(chunk_sizes, unfold_all=True)
    layout, tokens = lay_out(config.data.raw_tokens, measure_sample(config).length, config.gist, True)
    seen = layout.intervals.dense_mask()[0]
    before = torch.ones_like(seen).tril() & (layout.doc[0] >= 0)
    raw = (layout.text[0])[:, None]
    # A token sees gists before it, and raw tokens up to itself.
    wide = int(torch.where(raw, before, seen)[:tokens].sum())
    forgets, recalls = (size for _, size in measure_sample(config).layers)
    assert (forgets.keys, recalls.keys) == (int(seen[:tokens].sum()), wide) and not recalls.recalls
    half = measure_sample(replace(config, gist=replace(config.gist, unfold_all=False, unfold_share=0.5))).layers[1][1]
    assert half.keys == pytest.approx((forgets.keys + wide) / 2, abs=1) and half.recall.part == 0.5


@pytest.mark.parametrize("suffix", [0.1, 1.0])
def test_ranks_fetch_what_the_plan_says(suffix):
    """Two ranks that exchange gists: queries of one, keys that it has, chunks that it asks for, when selection is chance."""
    alone = recalling((8, 4), raw=3 + 32 * 48, budget_ratio=64)
    config = replace(alone, parallel=replace(alone.parallel, context=2))
    model = config.model
    if suffix < 1:
        config = replace(config, gist=replace(config.gist, recall="suffix"))
    size = measure_sample(config, suffix=suffix).layers[1][1]
    layout, _ = lay_out(config.data.raw_tokens, size.length, config.gist, True)
    after = layout.text & (layout.text.cumsum(1) > config.data.raw_tokens * (1 - suffix))
    tree = build_recall(layout, config.gist, recalling_tokens(layout, config.gist, after))
    division = Division.even([layout.intervals], 2)
    plans = [make_recall_plan(tree, division, rank) for rank in range(2)]
    asked = [wanted_chunks(plan, by_chance(plan.short, config.gist, model.heads, model.kv_heads)) for plan in plans]
    last = max(range(2), key=lambda rank: division.spans[rank][-1])  # it has the last tokens, which see most
    fetch = Asked(plans[last].lacks, plans[last].short, torch.cat(asked)).fetch()
    assert size.recall.queries == plans[last].short.queries > 0 and size.near == plans[last].short.others.tokens
    assert size.sent == plans[last].exports.exported.shape[1]
    assert size.recall.fetched == pytest.approx(sum(fetch.received), rel=0.05, abs=8)
    forgets = replace(size, recall=None)
    more = [context_exchange(config, Activations.of(config, x))[0] for x in (size, forgets)]
    assert more[0] - more[1] == size.recall.fetched * 2 * 2 * 32 * 4  # keys and values of two heads of 32, fp32


def test_heads_and_stages_are_divided():
    """Tensor parallelism and ulysses halve the lists of a rank; a pipeline stage has the layers that it has."""
    config = recalling(raw=3 + 8 * 90)
    config = replace(config, model=replace(config.model, layers=4), gist=replace(config.gist, recall_from=2))
    split = lambda **settings: replace(config, parallel=replace(config.parallel, **settings))
    kept = {}
    for name, settings in {"alone": {}, "tensor": {"tensor": 2}, "ulysses": {"context": 2, "context_method": "ulysses"}}.items():
        changed = split(**settings)
        sample = measure_sample(changed)
        forgets, recalls = (Activations.of(changed, sample.of_stage(stage, 2)) for stage in range(2))
        assert forgets.recalling() == 0 < recalls.recalling()
        kept[name] = recalls.attention() - forgets.attention(), recalls.recalling()
        whole = Activations.of(changed, sample)
        assert whole.attention() == pytest.approx((recalls.attention() + forgets.attention()) / 2, abs=1)
    for name in ("tensor", "ulysses"):
        assert [2 * x for x in kept[name]] == pytest.approx(kept["alone"], rel=0.02)


def planned(*overrides: str, raw: int = 32768, suffix: float = recall.SUFFIX) -> Plan:
    return Planner(Cluster(find_gpu("H200", None), 8, 8), suffix).plan(llama(raw, *overrides))


def test_recall_costs_memory_and_time():
    """More the more tokens recall; unfolding everything costs attention what dense attention costs, and no lists."""
    none, part, every = (planned(f"gist.recall={recalls}") for recalls in ("none", "suffix", "all"))
    assert none.fullest.total < part.fullest.total < every.fullest.total
    assert 0 == none.time.recall.seconds < part.time.recall.seconds < every.time.recall.seconds < every.time.attention.seconds
    assert planned("gist.recall=suffix", suffix=0.2).time.recall.seconds > 1.5 * part.time.recall.seconds
    routed = planned("gist.recall=suffix", "gist.route_loss=1")
    assert part.time.recall.seconds < routed.time.recall.seconds < 1.5 * part.time.recall.seconds
    assert part.fullest.activations < routed.fullest.activations
    wide = planned("gist.recall=all", "gist.unfold_all=true")
    dense = planned("model.attention=dense").time.attention.seconds
    assert wide.time.recall.seconds == 0 and 0.5 * dense < wide.time.attention.seconds < 1.3 * dense
    assert none.fullest.activations <= wide.fullest.activations < 1.01 * none.fullest.activations
    full = planned("gist.recall=all", "train.activation_checkpointing=full")
    assert full.time.recall.again == pytest.approx(every.time.recall.seconds * rates.RECALL.forward)
    with pytest.raises(UserError, match="gist.top_p: 0.5; GPU kernels select by number; set gist.topk"):
        planned("gist.recall=all", "gist.top_p=0.5")


def test_shares_are_printed(capsys):
    command = ["plan", "--config", str(CONFIGS / "paper" / "llama-3.2-1b-recall.yaml"), "--gpus", "8", "--gpu", "H100"]
    assert main([*command, "--suffix", "0.25", "--compare", "none"]) == 0
    text = capsys.readouterr().out
    assert "recall in 15 layers: 0.25 of the raw tokens (--suffix)" in text and "    of which recall " in text
    assert main([*command, "--suffix", "1.5"]) == 1 and "error: --suffix 1.5: is not a part" in capsys.readouterr().err
