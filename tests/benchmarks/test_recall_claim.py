"""The experiment's parts: the task says what it means, ways differ in nothing but what they say, results are kept."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.benchmarks.recall_claim import arms
from tests.benchmarks.recall_claim.arms import WAYS, gist_arm
from tests.benchmarks.recall_claim.command import Results, _run_seed, made_longer
from tests.benchmarks.recall_claim.report import table, write_report
from tests.benchmarks.recall_claim.task import LookupTask
from tests.benchmarks.recall_claim.training import Outcome, Plan, base_model, loss_of, train_stage
from unfold.model.gist import GistConfig
from unfold.model.visibility import IGNORED, MicroBatchAttention
from unfold.pretrain.errors import UserError

TASK = LookupTask(context=64, facts=10, links=3, singles=5)
SMALL = Plan(
    base=((32, 2),), forget=((32, 1), (64, 1)), branch=((64, 2),), batch=2, evaluated=4, layers=3, hidden_size=32, task=TASK,
    context=64,
)  # fmt: skip


def test_every_answer_stands_in_the_context():
    for seed in range(20):
        context, asked, answers = TASK.sample(np.random.default_rng(seed))
        facts = dict(divmod(int(t), TASK.values) for t in context if t < TASK.link_ids)
        links = dict(divmod(int(t) - TASK.link_ids, TASK.keys) for t in context if TASK.link_ids <= t < TASK.key_ids)
        assert (len(context), len(facts), len(links), len(asked)) == (64, 10, 3, TASK.questions)
        aliases = 0
        for token, answer, following in zip(asked, answers, np.append(asked[1:], -1)):
            if token >= TASK.alias_ids:
                aliases += 1
                assert answer == following == TASK.key_ids + links[token - TASK.alias_ids]
            else:
                assert answer == TASK.value_ids + facts[token - TASK.key_ids]
        assert aliases == 3


def test_a_question_of_two_hops_counts_only_when_both_are_right():
    batch = TASK.batch(np.random.default_rng(0), 4, GistConfig((8,), recall="suffix"))
    one, two = TASK.score(batch, batch.labels)
    assert one.all() and two.all() and (len(one), len(two)) == (4 * 5, 4 * 3)
    alias = ((batch.ids >= TASK.alias_ids) & (batch.ids < TASK.value_ids)).nonzero()[0]
    for place in (alias, alias + torch.tensor([0, 1])):
        answers = batch.labels.clone()
        answers[tuple(place)] = 0
        one, two = TASK.score(batch, answers)
        assert one.all() and int(two.sum()) == 11


def test_contexts_are_closed_and_questions_recall():
    config = GistConfig((8, 2), recall="suffix")
    batch = TASK.batch(np.random.default_rng(0), 2, config)
    recalling = torch.zeros(batch.ids.numel(), dtype=torch.bool)
    recalling[batch.recall.tree.tokens] = True
    recalling = recalling.view_as(batch.ids)
    assert (recalling.sum(1) == TASK.questions).all() and recalling[:, -TASK.questions :].all()
    before = batch.layout.level[:, -TASK.questions - 1]
    assert (before >= 0).all() and (batch.ids[batch.layout.level >= 0] >= TASK.gist_ids).all()
    assert (batch.labels[~recalling] == IGNORED).all()


@pytest.fixture
def queries():
    config = WAYS["taught"].gist((4, 2), SMALL.layers)
    batch = TASK.batch(np.random.default_rng(1), 2, config)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, batch.ids.shape[1], 2, 16, generator=draw) for _ in range(3))
    return config, batch, q, k, v


def attend(way, config, batch):
    return gist_arm(WAYS[way], config, batch, heads=2, kv_heads=2, draw=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("wide", [False, True])
def test_recall_is_the_recall_of_training(queries, wide):
    config, batch, q, k, v = queries
    if wide:
        config = dataclasses.replace(config, unfold_all=True)
        batch = TASK.batch(np.random.default_rng(1), 2, config)
    batch = dataclasses.replace(batch, recall=batch.recall.weighing(0.5))
    for layer in range(3):
        results = []
        for arm in (attend("taught", config, batch), MicroBatchAttention("gist", batch.layout, batch.recall)):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = arm(layer, *leaves)
            loss = sum(arm.routed) if getattr(arm, "routed", None) else 0.0
            (out.square().sum() + 0.5 * loss).backward()
            results.append((out, *(x.grad for x in leaves)))
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_blind_ways_have_the_budget_of_recall_and_look_elsewhere(queries):
    _, _, q, k, v = queries
    config = WAYS["recall"].gist((4, 2), SMALL.layers)
    batch = TASK.batch(np.random.default_rng(1), 2, config)
    outs, selected = {}, {}
    for way in ("recall", "random", "recent"):
        outs[way] = attend(way, config, batch)(1, q, k, v)
        selected[way] = batch.recall.stats.pop(1).selected.tolist()
    assert selected["random"] == pytest.approx(selected["recall"]) and selected["recent"] == pytest.approx(selected["recall"])
    assert not torch.allclose(outs["random"], outs["recall"]) and not torch.allclose(outs["recent"], outs["recall"])
    # The most recent chunks stand at the context's end: keys before them do not matter, but for the sinks and their gists.
    far = k.clone()
    far[:, 8:24] += (batch.layout.level[:, 8:24] < 0)[..., None, None] * 5.0
    again = attend("recent", config, batch)(1, q, far, v)
    asked = slice(-TASK.questions, None)
    torch.testing.assert_close(again[:, asked], outs["recent"][:, asked], rtol=0, atol=0)
    assert not torch.allclose(attend("recall", config, batch)(1, q, far, v)[:, asked], outs["recall"][:, asked])


def test_dense_mass_chooses_the_chunk_that_is_looked_at(queries):
    """Where a question's key stands in one place alone, the chunk of that place is selected at every level."""
    config = WAYS["mass"].gist((4, 2), SMALL.layers)
    batch = TASK.batch(np.random.default_rng(1), 1, config)
    tree = batch.recall.tree
    tokens = batch.ids.shape[1]
    q, k, v = torch.zeros(1, tokens, 1, 8), torch.zeros(1, tokens, 1, 8), torch.zeros(1, tokens, 1, 8)
    raw = (batch.layout.level[0] < 0).nonzero()[:, 0]
    place = int(raw[20])
    k[0, place, 0, 0], q[0, -TASK.questions :, 0, 0], v[0, place, 0, 1] = 9.0, 9.0, 1.0
    out = gist_arm(WAYS["mass"], config, batch, 1, 1, torch.Generator())(2, q, k, v)
    assert (out[0, -TASK.questions :, 0, 1] > 0.99).all()
    assert int(tree.lo[tree.levels].min()) > int(tree.others.row_of[0, place]), "it is in nobody's window"


def test_the_loss_is_that_of_training(build):
    """Weights and means of the experiment's loss: cross-entropy per answer, routing per question, head and layer."""
    model = base_model(SMALL, build)
    config = WAYS["taught"].gist((4, 2), SMALL.layers)
    batch = TASK.batch(np.random.default_rng(3), 2, config)
    ours = loss_of(model, WAYS["taught"], config, batch, torch.Generator())
    queries = batch.recall.routing.routed.tree.queries
    weighed = dataclasses.replace(batch, recall=batch.recall.weighing(1.0))
    answers = (batch.labels != IGNORED).sum()
    cross_entropy = model(weighed) / answers
    routing = sum(weighed.recall.routing.losses.values()) / queries
    assert len(weighed.recall.routing.losses) == 1, "recall from the layer that is the number of levels"
    torch.testing.assert_close(ours, cross_entropy + routing, rtol=2e-5, atol=0)


@pytest.mark.parametrize("way", ["taught", "recall", "gists"])
def test_long_samples_attend_as_in_training(build, monkeypatch, way):
    """Loss and gradients of an arm in long samples, which masks would make slow, are those of the masks."""
    model, results = base_model(SMALL, build).double(), []
    config = WAYS[way].gist((4, 2), SMALL.layers)
    if way == "gists":
        config = dataclasses.replace(config, recall="none")
    for masked in (0, 10_000):
        monkeypatch.setattr(arms, "MASKED", masked)
        batch = TASK.batch(np.random.default_rng(3), 2, config)
        loss = loss_of(model, WAYS[way], config, batch, torch.Generator())
        parameters = list(model.parameters())
        results.append((loss.detach(), *torch.autograd.grad(loss, parameters)))
    for trained, by_masks in zip(*results):
        torch.testing.assert_close(trained, by_masks, rtol=1e-9, atol=1e-9)


def test_a_sparse_teacher_that_reads_every_chunk_is_the_whole_one(queries, monkeypatch):
    """Loss and gradient; with a few chunks the loss is another."""
    config, _, q, k, v = queries
    losses = {}
    for others in (None, 10**6, 4):
        monkeypatch.setitem(WAYS, "sparse", dataclasses.replace(WAYS["sparse"], others=others))
        batch = TASK.batch(np.random.default_rng(1), 2, config)
        keys = k.clone().requires_grad_()
        arm = attend("sparse", config, batch)
        arm(2, q, keys, v)
        losses[others] = (sum(arm.routed).detach(), torch.autograd.grad(sum(arm.routed), keys)[0])
    assert losses[None][0] > 0 and losses[None][1].abs().max() > 0
    for whole, all_drawn in zip(losses[None], losses[10**6]):
        torch.testing.assert_close(all_drawn, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(losses[4][0], losses[None][0], rtol=1e-4)


def test_every_so_many_steps_only_forget(build, monkeypatch):
    seen = []
    batch = LookupTask.batch
    monkeypatch.setattr(LookupTask, "batch", lambda task, draw, size, gist: seen.append(gist) or batch(task, draw, size, gist))
    mixed = WAYS["mixed"]
    train_stage(base_model(SMALL, build), mixed, SMALL, mixed.gist((4, 2), SMALL.layers), ((32, 5), (64, 4)), [1, 2])
    stage = seen[-9:]
    assert [g.recall for g in stage] == ["none", *["suffix"] * 3] * 2 + ["none"]
    assert [g.unfold_all for g in stage if g.recall != "none"] == [True] * 3 + [False] * 3


def test_weights_and_first_layers():
    flat, two, three = (WAYS["taught"].gist(sizes, 3) for sizes in ((16,), (4, 4), (8, 2, 2)))
    assert [(g.recall_from, g.route_loss, g.own_group) for g in (flat, two, three)] == [(1, 2, False), (2, 1, True), (2, 1, True)]
    assert WAYS["no-late"].gist((4, 4), 3).route_loss == 2 and WAYS["recall"].gist((4, 4), 3).route_loss == 0


def test_longer_contexts_ask_no_more():
    plan = made_longer(Plan(), 1024)
    assert plan.context == 1024 and plan.branch[-1][0] == 1024
    task = plan.task.scaled(1024)
    assert (task.context, task.facts, task.questions) == (1024, plan.task.facts, plan.task.questions)


def test_results_are_kept_and_belong_to_their_settings(build, tmp_path):
    results = Results(tmp_path, SMALL)
    ways = ["gists", "taught", "recent"]
    lines = list(_run_seed(results, SMALL, build, [(8,)], ways))
    assert len(lines) == 1 + len(ways)
    kept = Results(tmp_path, SMALL)
    assert list(_run_seed(kept, SMALL, build, [(8,)], ways)) == []
    assert len(list(_run_seed(kept, SMALL, build, [(8,)], ["gists", "random"]))) == 1
    outcomes = kept.outcomes()
    assert {o.arm for o in outcomes if o.chunk_sizes} == {*ways, "random"} and all(np.isfinite(o.loss) for o in outcomes)
    assert "seed 1 chunks [8] taught" in lines[2]
    with pytest.raises(UserError, match="made with other settings"):
        Results(tmp_path, Plan())
    list(write_report(tmp_path, outcomes, SMALL))
    assert (tmp_path / "recall-claim.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text()) == [json.loads(json.dumps(o.to_dict())) for o in outcomes]


def test_the_table_gives_mean_and_spread_of_the_seeds():
    make = lambda seed, one: Outcome(seed, "gists", (8, 4), one, 0.25, 1.0, one, 0.0, 1.0)
    line = table([make(0, 0.5), make(1, 0.7)])[-1]
    assert line == "| 32 | 8, 4 | gists only | 0.60 (0.50 - 0.70) | 0.25 (0.25 - 0.25) | 0.60 (0.50 - 0.70) | - | 2 |"
