"""Look-ups over documents: what a sample is, and that documents read once and joined are answered as they were trained."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.benchmarks.linked_lookups import LINKS, LinkedLookups, decoded, run_arm, table
from tests.benchmarks.recall_claim.arms import WAYS
from tests.benchmarks.recall_claim.training import Plan, answered, base_model
from unfold.model.gist import Role
from unfold.model.visibility import IGNORED

TASK = LinkedLookups(context=64, facts=10, links=3, singles=5, document=16)
SMALL = Plan(
    base=((32, 2),), forget=((32, 1), (64, 1)), branch=((64, 2),), batch=2, evaluated=4, layers=3, hidden_size=32, task=TASK,
    context=64,
)  # fmt: skip


def test_a_sample_is_documents_links_and_questions():
    gist = WAYS["taught"].gist((4, 2), 3)
    batch = TASK.batch(np.random.default_rng(0), 2, gist)
    context, asked, answers = TASK.sample(np.random.default_rng(0))
    raw = batch.ids[0][batch.layout.text[0]]
    assert raw.tolist() == [*context, *asked] and batch.labels[0, -TASK.questions :].tolist() == answers.tolist()
    role, part = batch.layout.role[0], batch.layout.part[0]
    assert [int(((role == Role.PART) & (part == j) & (batch.layout.level[0] < 0)).sum()) for j in range(1, 5)] == [16] * 4
    assert batch.ids[0][role == Role.LINK].tolist() == list(TASK.part_links) * 4 and len(TASK.part_links) == LINKS
    assert (batch.labels[0][role != Role.SUFFIX] == IGNORED).all()
    recalling = batch.recall.tree.tokens.view(2, -1)[0]
    assert recalling.tolist() == (role == Role.SUFFIX).nonzero()[:, 0].tolist()
    short = dataclasses.replace(TASK, document=32).scaled(16)
    assert short.batch(np.random.default_rng(0), 1, gist).layout.part.max() == 1  # a context shorter than a document
    whole = dataclasses.replace(TASK, document=0).batch(np.random.default_rng(0), 1, gist)
    assert whole.layout.role is None and torch.equal(whole.ids[0][whole.layout.text[0]], raw)


@pytest.mark.parametrize("recall", ["suffix", "none"])
def test_documents_read_once_are_answered_as_trained(build, recall):
    model = base_model(SMALL, build)
    gist = dataclasses.replace(WAYS["taught"].gist((4, 2), 3), recall=recall)
    trained, cached = answered(model, "taught", SMALL, gist), decoded(model, SMALL, gist, samples=4)
    assert cached[:2] == trained[:2] and cached[2] == pytest.approx(trained[2], abs=1e-5)


def test_an_arm_is_measured_in_every_way_of_reading(build, tmp_path):
    outcome = run_arm(SMALL, base_model(SMALL, build), (4,), "linked")
    assert all(np.isfinite(reading["loss"]) for reading in outcome["readings"].values())
    (tmp_path / "seed1-4-linked.json").write_text(json.dumps(outcome))
    lines = list(table(tmp_path))
    assert lines[2].startswith("| 4 | linked | ") and lines[2].endswith(" | 1 |") and len(lines) == 3
