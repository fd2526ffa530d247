"""Stages of a run, and what is drawn for every sample."""

import numpy as np
import pytest
import yaml

from unfold.model.gist import GistConfig, interleave
from unfold.model.gist.recall import RECALLS, ROUTES, UNFOLDS_ALL
from unfold.pretrain.config import gist_at, load_config, parse_saved, saved_settings
from unfold.pretrain.data.flags import plain_flags, sample_flags
from unfold.pretrain.errors import UserError


def config_of(tiny, path, *overrides, **sections):
    return load_config(tiny.config(path / "c.yaml", **sections), list(overrides))


def test_a_stage_holds_until_its_step(tiny, tmp_path):
    stages = [{"until": 3, "recall": "none"}, {"until": 5, "topk": 2, "unfold_share": 0.5}]
    config = config_of(tiny, tmp_path, train={"steps": 8, "stages": stages}, gist={"recall": "all", "budget_ratio": 4})
    found = [gist_at(config, step) for step in range(1, 9)]
    assert [g.recall for g in found] == ["none"] * 3 + ["all"] * 5
    assert [(g.topk, g.budget_ratio) for g in found] == [(None, 4)] * 3 + [(2, None)] * 2 + [(None, 4)] * 3
    assert found[-1] == config.gist
    again = load_config(_written(config, tmp_path))
    assert again == config


def _written(config, tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    return path


def test_stages_may_stand_on_the_command_line(tiny, tmp_path):
    config = config_of(tiny, tmp_path, "train.steps=9", "train.stages=[{until: 3, unfold_all: true}, {until: 6}]")
    assert [s.until for s in config.train.stages] == [3, 6]
    assert gist_at(config, 3).unfold_all and not gist_at(config, 4).unfold_all


@pytest.mark.parametrize(
    "stages,said",
    [
        ([{"until": 4}, {"until": 4}], "train.stages.1.until: 4 is not after the stage before it, which ends with step 4"),
        ([{"until": 40}], r"train.stages.0.until: 40 is beyond train.steps \(10\)"),
        ([{"until": 4, "recal": "all"}], "train.stages.0.recal: unknown key; did you mean train.stages.0.recall?"),
        ([{"until": 4, "recall": "some"}], "train.stages.0.recall: 'some' is not one of none, suffix, all"),
        ([{"until": 4, "topk": 2, "top_p": 0.5}], "train.stages.0.topk, top_p: set at most one of them"),
        ([{"until": 4, "forget_share": 0.8}], "train.stages.0.unfold_share: 0.5 and forget_share"),
        ([{"until": 4, "route_loss": float("inf")}], "train.stages.0.route_loss: inf is not a finite number"),
        ([{"until": True}], "train.stages.0.until: true is no number"),
        ([3], "train.stages.0: input should be a dictionary"),
    ],
)
def test_stages_that_cannot_be(tiny, tmp_path, stages, said):
    with pytest.raises(UserError, match=said):
        config_of(tiny, tmp_path, train={"steps": 10, "stages": stages}, gist={"recall": "all", "unfold_share": 0.5})


def test_the_setting_that_stages_replaced(tiny, tmp_path):
    with pytest.raises(UserError, match="train.recall_after: unknown key; write train.stages"):
        config_of(tiny, tmp_path, "train.recall_after=4")
    config = config_of(tiny, tmp_path, train={"steps": 10}, gist={"recall": "all"}).to_dict()
    del config["train"]["stages"]
    config["train"]["recall_after"] = 4
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    old, notes = saved_settings(tmp_path)
    assert notes == [] and [(s["until"], s["recall"]) for s in old["train"]["stages"]] == [(4, "none")]
    assert parse_saved(config, "manifest.json").train.stages[0].until == 4


@pytest.fixture
def sample():
    gist = GistConfig((4, 2), recall="all", route_loss=1.0, route_queries=20)
    ids = np.arange(100)
    made = interleave(ids, [60, 5, 35], np.ones(200, bool), gist, [150, 151])
    return gist, made, np.zeros(len(made.ids), bool)


def test_draws_are_a_function_of_seed_and_sample(sample):
    gist, made, suffix = sample
    draw = lambda seed, number: sample_flags(made, suffix, gist, seed, number).tolist()
    assert draw(1, 5) == draw(1, 5) and draw(1, 5) != draw(2, 5) and draw(1, 5) != draw(1, 6)


def test_queries_have_a_gist_before_them(sample):
    gist, made, suffix = sample
    flags = sample_flags(made, suffix, gist, 1, 0)
    raw = made.level < 0
    assert (flags[~raw] == 0).all() and (flags[raw] & RECALLS).all() and not (flags & UNFOLDS_ALL).any()
    routed = np.flatnonzero(flags & ROUTES)
    assert len(routed) == 20
    for token in routed:
        assert (made.level[:token][made.doc[:token] == made.doc[token]] == 0).any()


def test_shares_of_samples(sample):
    gist, made, suffix = sample
    mixed = GistConfig((4, 2), recall="all", forget_share=0.25, unfold_share=0.5)
    drawn = [sample_flags(made, suffix, mixed, 3, number) for number in range(400)]
    forget = np.mean([not flags.any() for flags in drawn])
    unfold = np.mean([bool((flags & UNFOLDS_ALL).any()) for flags in drawn])
    assert abs(forget - 0.25) < 0.08 and abs(unfold - 0.5) < 0.08
    assert set(np.concatenate(drawn)) == {0, RECALLS, RECALLS | UNFOLDS_ALL}


def test_suffixes_alone_recall(sample):
    _, made, suffix = sample
    suffix[-20:] = made.level[-20:] < 0
    flags = plain_flags(made, suffix, GistConfig((4, 2), recall="suffix"))
    assert (flags.astype(bool) == suffix).all()
    assert not plain_flags(made, suffix, GistConfig((4, 2))).any()
