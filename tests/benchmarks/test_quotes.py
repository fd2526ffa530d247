"""The benchmark's parts: quotes are quotes, ways differ in nothing but their settings, results are kept."""

import dataclasses
import json
import shutil
from argparse import Namespace

import numpy as np
import pytest

from tests.benchmarks.quotes.command import Results, run
from tests.benchmarks.quotes.data import PLAIN, Quoting
from tests.benchmarks.quotes.report import Outcome, table, write_report
from tests.benchmarks.quotes.training import Plan, Reading, way_config
from tests.benchmarks.quotes.ways import ways_of
from unfold.pretrain.config import gist_at
from unfold.pretrain.errors import UserError

SMALL = Plan(
    short=Quoting(32, 8, 2, 4), quoting=Quoting(64, 8, 2, 4), short_steps=2, base_steps=1, steps=6, batch=128, evaluated=2,
    documents=32, layers=2, hidden_size=32, nope_layers=(1,),
)  # fmt: skip


def test_every_quote_stands_in_the_first_half():
    quoting = Quoting(128, 16, 4, 12)
    first, second = np.arange(64), np.arange(100, 164)
    ids, tags = quoting.document(first, second, np.random.default_rng(0))
    assert len(ids) == len(tags) == 128 and (tags[:64] == PLAIN).all() and (ids[:64] == first).all()
    quoted = tags >= 0
    assert (ids[quoted] < 64).all() and (ids[64:][~quoted[64:]] >= 100).all()
    inside = np.flatnonzero(tags > 0)
    assert (ids[inside] == ids[inside - 1] + 1).all() and (tags[inside] == tags[inside - 1] + 1).all()
    assert len(np.unique(ids[tags == 0])) > 1 and quoted[64:].mean() > 0.5


@pytest.mark.parametrize("chunk_sizes", [(16,), (4, 4)])
def test_ways_are_settings_of_training(tmp_path, chunk_sizes):
    configs = {name: way_config(SMALL, tmp_path, way, chunk_sizes, 0) for name, way in ways_of(chunk_sizes).items()}
    at = lambda name, step: gist_at(configs[name], step)
    assert at("dense", 1) is None and [at("paper", step).recall for step in (3, 4)] == ["none", "all"]
    assert [at("recipe", step).unfold_all for step in range(1, 7)] == [True] * 2 + [False] * 4
    assert [at("shrink", step).budget_ratio for step in range(3, 7)] == [2, 4, 8, None]
    assert at("share", 6).unfold_share == 0.25 and at("twice", 6).budget_ratio == 8 and configs["longer"].train.steps == 12
    levels = len(chunk_sizes)
    assert (at("recipe", 6).recall_from, at("recipe", 6).own_group) == (levels, levels > 1) and not at("paper", 6).own_group
    data, seeds = {c.data for c in configs.values()}, {c.train.seed for c in configs.values()}
    assert len(data) == len(seeds) == 1, "all ways see the same samples"


def test_results_are_kept_and_belong_to_their_settings(tmp_path, tiny):
    results = Results(tmp_path, SMALL)
    results.data.mkdir()
    shutil.copytree(tiny.tokenizer, results.data / "tokenizer")
    for split in ("train", "valid"):
        for suffix in ("bin", "idx", "json"):
            shutil.copy(tiny.root / f"tiny_{split}.{suffix}", results.data / f"text_{split}.{suffix}")
    args = Namespace(seeds=[1], chunk_sizes=(4,), ways=["dense", "recipe", "logits"], text=[])
    lines = list(run(results, SMALL, args))
    assert len(lines) == 3 and "seed 1 chunks [4] recipe" in lines[1]
    assert list(run(Results(tmp_path, SMALL), SMALL, args)) == []
    outcomes = results.read()
    assert {o.way for o in outcomes} == set(args.ways)
    assert all(np.isfinite(dataclasses.astuple(reading)).all() for o in outcomes for reading in o.read.values())
    taught = next(o for o in outcomes if o.way == "recipe")
    assert taught.own == taught.read["recall"] and taught.own.unfolded > 0 and 0 < taught.far_coverage <= 1
    assert taught.own.unfolded < taught.read["everything"].unfolded and taught.read["forget"].unfolded == 0
    with pytest.raises(UserError, match="made with other settings"):
        Results(tmp_path, Plan())
    assert list(write_report(tmp_path, outcomes, SMALL)) == (tmp_path / "table.md").read_text().splitlines()
    assert (tmp_path / "quotes.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "results.json").read_text()) == [json.loads(json.dumps(o.to_dict())) for o in outcomes]


def test_the_table_gives_mean_and_spread_of_the_seeds():
    reading = lambda quote: Reading(quote, 4.0, 3.5, 3.25, 0.0)
    make = lambda seed, quote: Outcome(
        seed, "dense", (16,), 300, 1.0, {"dense": reading(quote), "everything": reading(2.0)}, None
    )
    line = table([make(0, 0.5), make(1, 0.75)])[-1]
    cells = ["16", "dense attention", "300", "0.625 (0.500 - 0.750)", "3.500 (3.500 - 3.500)", "-", "-"]
    assert line == f"| {' | '.join([*cells, '2.00 (2.00 - 2.00)', '0.62 (0.50 - 0.75)', '2'])} |"
