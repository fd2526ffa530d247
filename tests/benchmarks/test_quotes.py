"""The benchmark's parts: quotes are quotes, ways differ in nothing but their settings, results are kept."""

import dataclasses
import json
import re
import shutil
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.benchmarks.quotes import training
from tests.benchmarks.quotes.command import Results, quotes, run, setting, sized
from tests.benchmarks.quotes.data import PLAIN, Quoting, Repeating, make_data
from tests.benchmarks.quotes.report import Outcome, table, write_report
from tests.benchmarks.quotes.training import Plan, Reading, loss_of, way_config
from tests.benchmarks.quotes.ways import ways_of
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer
from unfold.pretrain import parallel
from unfold.pretrain.config import ParallelConfig
from unfold.pretrain.errors import UserError
from unfold.pretrain.train.added import Added
from unfold.pretrain.train.inputs import open_inputs
from unfold.pretrain.train.step import train_step

SMALL = Plan(
    short=Repeating(32, 4, 8), quoting=Quoting(64, 8, 2, 4), short_steps=2, base_steps=1, steps=6, batch=128, evaluated=2,
    documents=32, layers=3, hidden_size=32,
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


def test_what_repeats_is_a_piece_of_one_document():
    text = SimpleNamespace(tokens=np.arange(40), starts=np.array([0, 3, 20]), lengths=np.array([3, 17, 20]))
    ids, tags = Repeating(32, 4, 8).documents(text, 20, [0])
    pieces = set()
    for row, tag in zip(ids, tags):
        length = int((tag == PLAIN).sum())
        pieces.add(length)
        assert (row[:length] == row[0] + np.arange(length)).all() and not row[0] < 20 <= row[length - 1] and row[0] >= 3
        assert (row[length:] == row[:-length]).all() and (tag[length:] == np.arange(length, 32) % length).all()
    assert pieces == {4, 5, 6, 7, 8}


@pytest.mark.parametrize("chunk_sizes", [(16,), (4, 4)])
def test_ways_are_settings_of_training(tmp_path, chunk_sizes):
    configs = {name: way_config(SMALL, tmp_path, way, chunk_sizes, 0) for name, way in ways_of(chunk_sizes).items()}
    at = lambda name, step: configs[name].at(step).folding
    assert at("dense", 1) is None and [at("paper", step).recall for step in (3, 4)] == ["none", "all"]
    assert [at("recipe", step).unfold_all for step in range(1, 7)] == [True] * 2 + [False] * 4
    assert [at("shrink", step).budget_ratio for step in range(3, 7)] == [2, 4, 8, None]
    assert at("share", 6).unfold_share == 0.25 and at("twice", 6).budget_ratio == 8 and configs["longer"].train.steps == 12
    assert at("half-longer", 10).unfold_share == 0.5 and at("half-longer", 10).budget_ratio == 8
    levels = len(chunk_sizes)
    assert (at("recipe", 6).recall_from, at("recipe", 6).own_group) == (levels, levels > 1) and not at("paper", 6).own_group
    data, seeds = {c.data for c in configs.values()}, {c.train.seed for c in configs.values()}
    assert len(data) == len(seeds) == 1, "all ways see the same samples"


def test_ways_go_on_in_the_last_of_the_lengths(tmp_path):
    plan = dataclasses.replace(SMALL, lengths=(128, 512), length_steps=4)
    assert [(name, q.raw_tokens, q.span) for name, q in plan.stages] == [
        ("quotes", 64, 8), ("quotes128", 128, 8), ("quotes512", 512, 8),
    ]  # fmt: skip
    assert plan.whole.raw_tokens == 512 and SMALL.whole == SMALL.quoting
    dense = [training.dense_config(plan, tmp_path, 1, stage) for stage in range(3)]
    assert [c.data.raw_tokens for c in dense] == [64, 128, 512] and [c.train.steps for c in dense] == [1, 4, 4]
    assert len({c.train.seed for c in dense}) == 3 and dense[0] == training.dense_config(SMALL, tmp_path, 1)
    taught = way_config(plan, tmp_path, ways_of((4,))["both"], (4,), 1)
    assert "quotes512_train" in taught.data.train[1] and taught.data.raw_tokens == taught.gist.route_queries == 512


def test_further_settings_hold_for_all_or_for_gists(tmp_path):
    texts = ("model.nope_layers=[1]", "gist.route_loss=2", "gist.unfold_share=0.5", "distill.logits=0.5")
    plan = dataclasses.replace(SMALL, settings=tuple(map(setting, texts)))
    ways = ways_of((16,))
    dense, both = (way_config(plan, tmp_path, ways[name], (16,), 0) for name in ("dense", "both"))
    assert (both.gist.route_loss, both.gist.unfold_share, both.distill.logits) == (2, 0.5, 0.5)
    assert dense.gist == way_config(SMALL, tmp_path, ways["dense"], (16,), 0).gist and not dense.distill.logits
    for config in (dense, both, training.dense_config(plan, tmp_path, 0)):
        assert config.model.nope_layers == (1,)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lengths": [512, 512]}, "--lengths 512 512 --length-steps 150: must be rising multiples of 64 above --raw-tokens"),
        ({"lengths": [256]}, "rising multiples of 64 above --raw-tokens (256), 4096 at most"),
        ({"lengths": [500]}, "as 512 1024 and 150"),
        ({"lengths": [8192]}, "4096 at most"),
        ({"lengths": [512], "length_steps": 0}, "for a step or more each"),
        ({"settings": ["train.steps=3"]}, "--set train.steps=3: expected KEY=VALUE with a key of model, gist, distill"),
        ({"settings": ["gist.route_loss"]}, "--set gist.route_loss: expected KEY=VALUE"),
        ({"settings": ["gist.topk=["]}, "'[' is not a YAML value"),
    ],
)
def test_what_an_option_cannot_be_is_told(tmp_path, options, told):
    usual = {"train_steps": 1.0, "hidden_size": 64, "heads": 1, "raw_tokens": 256, "copies": None}
    args = Namespace(output=tmp_path, **{**usual, "lengths": [], "length_steps": 150, "settings": [], **options})
    with pytest.raises(UserError, match=re.escape(told)):
        next(quotes(args))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def quoting(tiny, tmp_path_factory):
    """Data of the experiment, of the tests' shards instead of books."""
    data = tmp_path_factory.mktemp("quotes") / "data"
    shutil.copytree(tiny.tokenizer, data / "tokenizer")
    for split in ("train", "valid"):
        for suffix in ("bin", "idx", "json"):
            shutil.copy(tiny.root / f"tiny_{split}.{suffix}", data / f"text_{split}.{suffix}")
    kinds = {"short": (SMALL.short, SMALL.documents), "quotes": (SMALL.quoting, SMALL.documents // 2)}
    make_data(data, SMALL.vocab_size, kinds, SMALL.evaluated, [])
    return data


def test_results_are_kept_and_belong_to_their_settings(tmp_path, quoting):
    results = Results(tmp_path, SMALL)
    shutil.copytree(quoting, results.data)
    args = Namespace(seeds=[1], chunk_sizes=(4,), ways=["dense", "recipe", "logits"], text=[])
    lines = list(run(results, SMALL, args))
    assert len(lines) == 3 and "seed 1 chunks [4] recipe" in lines[1]
    assert list(run(Results(tmp_path, SMALL), SMALL, args)) == []
    outcomes = results.outcomes()
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


@pytest.mark.parametrize(("copies", "taken"), [(None, 80), (6.0, 200), (1.0, 320)])
def test_the_dense_model_goes_on_until_it_copies(quoting, monkeypatch, copies, taken):
    plan = dataclasses.replace(SMALL, short_steps=80, base_steps=3, copies=copies)
    losses, steps = [7.0] * 100 + [5.0] * 220, []

    def pretended(model, config, parallel, plan, decay):
        for step in range(1, config.train.steps + 1):
            steps.append(config.data.raw_tokens)
            yield step, losses[step - 1]

    monkeypatch.setattr(training, "train", pretended)
    groups = parallel.initialize(ParallelConfig())
    training.base_model(plan, quoting, groups, BuildContext(groups.tensor_group, 0))
    assert steps == [plan.short.raw_tokens] * taken + [plan.quoting.raw_tokens] * 3


def test_the_dense_model_goes_on_in_longer_samples_from_where_it_was_cut_off(tmp_path, quoting, monkeypatch):
    plan = dataclasses.replace(SMALL, lengths=(72, 96), length_steps=2)
    groups = parallel.initialize(ParallelConfig())
    build, trained = BuildContext(groups.tensor_group, 0), []

    def marked(model, config, parallel, plan, decay):
        if config.data.raw_tokens == stopped:
            raise KeyboardInterrupt
        trained.append((config.data.raw_tokens, config.train.steps))
        model.final_norm.weight.data += 1
        return iter(())

    monkeypatch.setattr(training, "train", marked)
    results = Results(tmp_path, plan)
    shutil.copytree(quoting, results.data)
    make_data(results.data, plan.vocab_size, {name: (q, 2) for name, q in plan.stages}, 2, [])
    stopped = 96
    with pytest.raises(KeyboardInterrupt):
        results.base_model(plan, groups, build)
    stopped = None
    model = results.base_model(plan, groups, build)
    assert trained == [(32, 2), (64, 1), (72, 2), (96, 2)] and (model.final_norm.weight == 5).all()
    again = results.base_model(plan, groups, build)
    assert len(trained) == 4 and (again.final_norm.weight == 5).all()


def test_wide_models_take_a_smaller_rate():
    wide = sized(Plan(), 128, 2)
    assert (wide.hidden_size, wide.heads, wide.kv_heads, wide.matrix_lr) == (128, 2, 2, Plan().matrix_lr / 2)
    assert sized(Plan(), 64, 1) == Plan()


def test_the_table_gives_mean_and_spread_of_the_seeds():
    reading = lambda quote: Reading(quote, 4.0, 3.5, 3.25, 0.0)
    make = lambda seed, quote: Outcome(
        seed, "dense", (16,), 300, 1.0, {"dense": reading(quote), "everything": reading(2.0)}, None
    )
    line = table([make(0, 0.5), make(1, 0.75)])[-1]
    cells = ["16", "dense attention", "300", "0.625 (0.500 - 0.750)", "3.500 (3.500 - 3.500)", "-", "-"]
    assert line == f"| {' | '.join([*cells, '2.00 (2.00 - 2.00)', '0.62 (0.50 - 0.75)', '2'])} |"


class PlainEngine:
    """What a step needs of DeepSpeed's engine, without DeepSpeed: the gradients stay as they are."""

    def __init__(self, model):
        self._model, self.module = model, SimpleNamespace(context_parallel=None)
        self.optimizer = SimpleNamespace(overflow=False)

    def __call__(self, batch):
        return self._model(batch)

    def backward(self, loss):
        loss.backward()

    def step(self):
        pass

    def get_global_grad_norm(self):
        return 0.0

    def zero_optimization_stage(self):
        return 0


@pytest.mark.parametrize("way", ["dense", "recipe", "logits", "hidden"])
def test_losses_weigh_as_in_training(quoting, way):
    groups = parallel.initialize(ParallelConfig())
    config = way_config(SMALL, quoting, ways_of((4,))[way], (4,), 0)
    gradients = []
    for weigh in ("here", "training"):
        model = Transformer(config.model, BuildContext(groups.tensor_group, 3))
        micro = next(open_inputs(config).batches(4, lambda number: number, groups))
        gist = config.at(5).folding  # behind the first third, so it is taught to route
        if weigh == "here":
            loss = loss_of(model, *micro, gist, config.distill)
            loss.backward()
        else:
            result = train_step(PlainEngine(model), micro, groups, config.model, gist, Added(distill=config.distill))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert loss.item() == pytest.approx(result.loss, rel=1e-6) and gradients[0].keys() == gradients[1].keys()
    assert (result.route_loss is None) == (way == "dense") and bool(result.added) == (way in ("logits", "hidden"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7, msg=name)
