"""The experiment's parts: the task says what it means, arms differ in nothing but the selection, results are kept."""

import json

import numpy as np
import pytest
import torch

from tests.benchmarks.recall_claim.arms import BRANCHES, GISTS, RANDOM, RECALL, RECENT, gist_arm
from tests.benchmarks.recall_claim.command import Results, _run_seed
from tests.benchmarks.recall_claim.report import table, write_report
from tests.benchmarks.recall_claim.task import LookupTask
from tests.benchmarks.recall_claim.training import Outcome, Plan
from unfold.model.gist import GistConfig
from unfold.model.visibility import IGNORED, MicroBatchAttention
from unfold.pretrain.errors import UserError

TASK = LookupTask(context=64, facts=10, links=3, singles=5)
SMALL = Plan(base=((2, 2),), forget=((2, 1),), branch=((1, 2),), batch=2, evaluated=4, layers=2, hidden_size=32, task=TASK)


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
    config = GistConfig((4, 2), recall="suffix")
    batch = TASK.batch(np.random.default_rng(1), 2, config)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, batch.ids.shape[1], 2, 16, generator=draw) for _ in range(3))
    return batch, q, k, v


def attend(arm, batch):
    return gist_arm(arm, batch, heads=2, kv_heads=2, draw=torch.Generator().manual_seed(1))


def test_recall_is_the_recall_of_training(queries):
    batch, q, k, v = queries
    ours = attend(RECALL, batch)(1, q, k, v)
    stats = batch.recall.stats.pop(1)
    torch.testing.assert_close(ours, MicroBatchAttention("gist", batch.layout, batch.recall)(1, q, k, v), rtol=0, atol=2e-6)
    assert stats.unfolded == batch.recall.stats[1].unfolded


def test_blind_arms_have_the_budget_of_recall_and_look_elsewhere(queries):
    batch, q, k, v = queries
    outs, selected = {}, {}
    for arm in (RECALL, RANDOM, RECENT):
        outs[arm] = attend(arm, batch)(1, q, k, v)
        selected[arm] = batch.recall.stats.pop(1).selected.tolist()
    assert selected[RANDOM] == pytest.approx(selected[RECALL]) and selected[RECENT] == pytest.approx(selected[RECALL])
    assert not torch.allclose(outs[RANDOM], outs[RECALL]) and not torch.allclose(outs[RECENT], outs[RECALL])
    # The most recent chunks stand at the context's end: keys before them do not matter, but for the sinks and their gists.
    far = k.clone()
    far[:, 8:24] += (batch.layout.level[:, 8:24] < 0)[..., None, None] * 5.0
    again = attend(RECENT, batch)(1, q, far, v)
    asked = slice(-TASK.questions, None)
    torch.testing.assert_close(again[:, asked], outs[RECENT][:, asked], rtol=0, atol=0)
    assert not torch.allclose(attend(RECALL, batch)(1, q, far, v)[:, asked], outs[RECALL][:, asked])


def test_results_are_kept_and_belong_to_their_settings(build, tmp_path):
    results = Results(tmp_path, SMALL)
    lines = list(_run_seed(results, SMALL, build, [(8,)]))
    assert len(lines) == 1 + len(BRANCHES)
    kept = Results(tmp_path, SMALL)
    assert list(_run_seed(kept, SMALL, build, [(8,)])) == []
    outcomes = kept.read()
    assert [o.arm for o in outcomes if o.chunk_sizes] == list(BRANCHES) and all(np.isfinite(o.loss) for o in outcomes)
    assert "seed 1 chunks [8] recall" in lines[2]
    with pytest.raises(UserError, match="made with other settings"):
        Results(tmp_path, Plan())
    list(write_report(tmp_path, outcomes, SMALL))
    assert (tmp_path / "recall-claim.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text()) == [json.loads(json.dumps(o.to_dict())) for o in outcomes]


def test_the_table_gives_mean_and_spread_of_the_seeds():
    make = lambda seed, one: Outcome(seed, GISTS, (8, 4), one, 0.25, 1.0, 0.0, 1.0)
    line = table([make(0, 0.5), make(1, 0.7)])[-1]
    assert line == "| 32 | 8, 4 | gists only | 0.60 (0.50 - 0.70) | 0.25 (0.25 - 0.25) | - | 2 |"
