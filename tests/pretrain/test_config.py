"""Configuration: types, unknown keys, everything at once, what may change on resume."""

import argparse
import re

import pytest
import yaml

from unfold.pretrain.config import add_overrides, changes_on_resume, load_config, parse_config, parse_saved, saved_settings
from unfold.pretrain.errors import UserError

MINIMAL = {"data": {"train": ["x"], "tokenizer": "t"}}


def errors_of(tree) -> str:
    with pytest.raises(UserError) as error:
        parse_config(tree)
    return str(error.value)


def test_every_error_is_reported_at_once():
    text = errors_of(
        {
            "data": {"trian": ["x"], "raw_tokens": "many"},
            "modl": {},
            "gist": {"chunk_sizes": [8, 0], "sink": -1},
            "train": {"steps": 1.5},
            "optimizer": {"lr": 0},
        }
    )
    for part in (
        "data.trian: unknown key; did you mean data.train?",
        "modl: unknown key; did you mean model?",
        "data.raw_tokens: input should be a valid integer",
        "'many'",
        "gist.chunk_sizes: [8, 0] has a size below 1",
        "gist.sink: -1 is below 0",
        "train.steps: input should be a valid integer",
        "optimizer.lr: 0.0 is not above 0",
    ):
        assert part in text, text
    assert "\n" not in text


@pytest.mark.parametrize(
    "section,values,message",
    [
        ("model", {"kv_heads": 3}, "model.kv_heads: 3 does not divide heads (4)"),
        ("model", {"attention": "fast"}, "'fast' is not one of gist, dense"),
        ("parallel", {"tensor": 3}, "parallel.tensor: 3 does not divide model.kv_heads (2)"),
        ("parallel", {"context": 4, "context_method": "ulysses"}, "context: 4 does not divide the 2 KV heads of a rank"),
        ("parallel", {"context": 8, "context_heads": 4}, "context_heads: 4 does not divide the 2 KV heads of a rank, as ulysses"),
        ("parallel", {"context": 4, "context_heads": 2, "tensor": 2}, "context_heads: 2 does not divide the 1 KV heads"),
        ("parallel", {"context": 3, "context_heads": 2}, "parallel.context_heads: 2 does not divide context (3); 1 would do"),
        ("parallel", {"context": 8, "context_heads": 16}, "parallel.context_heads: 16 does not divide context (8); 4 would do"),
        ("parallel", {"context_heads": 2}, "parallel.context_heads: 2 does not divide context (1); 1 would do"),
        ("parallel", {"context_heads": 0}, "parallel.context_heads: 0 is below 1"),
        (
            "parallel",
            {"context": 2, "context_heads": 2},
            "parallel.context_heads: 2 are all ranks of context; leave it out, and set context_method: ulysses",
        ),
        (
            "parallel",
            {"context": 4, "context_heads": 2, "context_method": "ulysses"},
            "parallel.context_heads: 2, but with context_method: ulysses all context ranks trade heads; leave it out",
        ),
        ("parallel", {"zero": 4}, "parallel.zero: 4 is not one of 1, 2, 3"),
        ("schedule", {"kind": "wsd", "warmup": 0.6, "decay": 0.6}, "together exceed 1"),
        ("train", {"global_batch": 6, "micro_batch": 4}, "micro_batch: 4 does not divide global_batch (6)"),
        ("data", {"raw_tokens": 9999}, "exceeds model.max_position"),
        ("distill", {"every": 0}, "distill.every: 0 is below 1"),
        ("gist", {"recall_from": 4}, "gist.recall_from: 4, but model.layers is 4, and none recalls; at most 3 would do"),
        ("gist", {"recall_from": 0}, "gist.recall_from: 0 is below 1"),
    ],
)
def test_misfits_are_refused(section, values, message):
    assert message in errors_of({**MINIMAL, section: {**MINIMAL.get(section, {}), **values}})


def test_dense_attention_has_no_gists_to_exchange():
    model = {**MINIMAL.get("model", {}), "attention": "dense"}
    message = "parallel.context: dense attention has no gists to exchange; set context_method: ulysses"
    for parallel in ({"context": 4}, {"context": 4, "context_heads": 2}):
        assert message in errors_of({**MINIMAL, "model": model, "parallel": parallel})


def test_sections_that_are_not_sections():
    assert "train" in errors_of({**MINIMAL, "train": 5})
    assert "data" in errors_of({})


def test_file_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {train: [x], tokenizer: t}\noptimizer: {lr: 3e-4}\n")
    config = load_config(path, ["optimizer.lr=1e-3", "gist.chunk_sizes=[16]", "monitor.name=a b"])
    assert (config.optimizer.lr, config.gist.chunk_sizes, config.monitor.name) == (1e-3, (16,), "a b")
    assert load_config(path).optimizer.lr == 3e-4
    assert parse_config(config.to_dict()) == config, "the resolved configuration reads back as itself"


@pytest.mark.parametrize(
    "text,overrides,message",
    [
        (None, [], "cannot be read"),
        ("a: [", [], "line 1 is not valid YAML"),
        ("- a", [], "expected sections"),
        ("data: {train: [x], tokenizer: t}", ["optimizer.lr"], "expected KEY=VALUE"),
        ("data: {train: [x], tokenizer: t}", ["precision.x=1"], "precision: input should be 'fp32' or 'bf16' (given: {'x': 1})"),
        ("data: {train: [x], tokenizer: t}", ["train.stepz=1"], "did you mean train.steps?"),
    ],
)
def test_bad_files_and_overrides(tmp_path, text, overrides, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="(?s)" + re.escape(message)):
        load_config(path, overrides)


def test_what_may_change_on_resume():
    old = parse_config(MINIMAL).to_dict()
    new = parse_config(
        {**MINIMAL, "parallel": {"zero": 3}, "checkpoint": {"every": 7}, "optimizer": {"lr": 0.1}, "train": {"steps": 9}}
    ).to_dict()
    assert changes_on_resume(old, new) == {
        "train.steps": "train.steps: 1000 in the run, 9 given",
        "optimizer.lr": "optimizer.lr: 0.0003 in the run, 0.1 given",
    }


def test_runs_from_before_a_setting_have_its_default(tmp_path):
    """A checkpoint that does not say whether chunks are word-aware was trained with those that are."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(MINIMAL))
    old, _ = saved_settings(tmp_path)
    assert not changes_on_resume(old, parse_config(MINIMAL | {"gist": {"word_aware": True}}).to_dict())
    changes = changes_on_resume(old, parse_config(MINIMAL | {"gist": {"word_aware": False}}).to_dict())
    assert changes == {"gist.word_aware": "gist.word_aware: True in the run, False given"}


def test_errors_are_not_taken_apart_at_semicolons():
    gist = errors_of({**MINIMAL, "model": {"hidden_size": 258}, "gist": {"topk": 1, "top_p": 0.5, "sink": -1}})
    assert gist.removeprefix("configuration: ").split("; ") == [
        "model.hidden_size: 258 is not a multiple of heads (4)",
        "set head_dim",
        "gist.sink: -1 is below 0",
        "gist.topk, top_p: set at most one of them, each is a budget of its own",
    ]


@pytest.mark.parametrize(
    "section,values,message",
    [
        ("optimizer", {"lr": float("nan")}, "optimizer.lr: nan is not a finite number"),
        ("faults", {"spike_z": float("inf")}, "faults.spike_z: inf is not a finite number"),
        ("train", {"steps": True}, "train.steps: true is not one of the values that it takes"),
        ("model", {"norm_eps": -1e-5}, "model.norm_eps: -1e-05 is not above 0"),
        ("model", {"init_std": -0.1}, "model.init_std: -0.1 is below 0"),
        ("schedule", {"floor": 1.5}, "schedule.floor: 1.5 is above 1"),
        ("optimizer", {"beta1": 1}, "optimizer.beta1: 1.0 is not below 1"),
        ("data", {"train": ""}, "data.train: no shard prefix given"),
        ("data", {"valid": [""]}, "data.valid: holds an empty shard prefix"),
    ],
)
def test_values_without_sense_are_refused(section, values, message):
    assert message in errors_of({**MINIMAL, section: {**MINIMAL.get(section, {}), **values}})


def test_one_item_stands_for_a_list_of_one():
    config = parse_config({"data": {"train": "a b", "valid": "c", "tokenizer": "t"}, "gist": {"chunk_sizes": 8}})
    assert (config.data.train, config.data.valid, config.gist.chunk_sizes) == (("a b",), ("c",), (8,))


def test_overrides_after_one_set_and_after_several():
    parser = argparse.ArgumentParser()
    add_overrides(parser)
    assert parser.parse_args(["--set", "a=1", "b=2", "--set", "c=3"]).overrides == ["a=1", "b=2", "c=3"]
    assert parser.parse_args([]).overrides == []


def test_checkpointing_of_earlier_versions_keeps_its_meaning():
    """Also in what a run or a checkpoint wrote."""
    for read in (parse_config, lambda tree: parse_saved(tree, "a manifest")):
        for said, meant in ((True, "full"), (False, "none"), ("selective", "selective")):
            assert read({**MINIMAL, "train": {"activation_checkpointing": said}}).train.activation_checkpointing == meant
    assert not changes_on_resume({"train": {"activation_checkpointing": True, "mlp_tiles": 1}}, {"train": {"mlp_tiles": 4}})


@pytest.mark.parametrize(
    "train,message",
    [
        ({"activation_checkpointing": "some"}, "train.activation_checkpointing: 'some' is not one of none, full, selective"),
        ({"mlp_tiles": 0}, "train.mlp_tiles: 0 is below 1"),
        (
            {"offload_activations": True},
            "train.offload_activations: true needs activation_checkpointing: full or selective (it is none)",
        ),
    ],
)
def test_what_activations_cannot_do_is_refused_in_one_line(train, message):
    text = errors_of({**MINIMAL, "train": train})
    assert message in text and "\n" not in text


def test_a_section_with_nothing_in_it_and_an_empty_file_are_told(tmp_path):
    told = errors_of(MINIMAL | {"train": None, "model": 3})
    assert "train: is empty; leave it out, or set something in it" in told and "model: 3 is no section of settings" in told
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    with pytest.raises(UserError, match="c.yaml: is empty, expected sections such as `model:`"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["optimizers", "precision2", "train.steps_per_day", "model"])
def test_what_is_no_setting_cannot_be_allowed_to_change(name):
    assert f"allow_changes: {name!r} is not one of optimizer" in errors_of(MINIMAL | {"train": {"allow_changes": [name]}})


def test_a_text_that_is_no_unicode_is_told():
    """Such as a path whose bytes are no UTF-8, as Python takes it from the command line."""
    told = errors_of(MINIMAL | {"train": {"init_from": "/caf\udce9"}, "monitor": {"name": "\ud800"}})
    assert "train.init_from: holds the byte 0xe9, which is no UTF-8" in told and "monitor.name: holds half of a surrogate" in told
    assert "'train.\\udce9': holds the byte 0xe9" in errors_of(MINIMAL | {"train": {"\udce9": 1}})
    assert "data.train.0: holds the byte" in errors_of({"data": {"train": ["\udce9"], "tokenizer": "t"}})
