"""YAML as people write it, and numbers that cannot be meant, in files and in flags."""

from __future__ import annotations

import pytest
import yaml

from unfold.data_prep.command import main as prepare
from unfold.launch.command import main as launch
from unfold.pretrain.command import main as pretrain
from unfold.pretrain.config import load_config, parse_config, read_yaml
from unfold.pretrain.config.yaml_text import parse_value
from unfold.pretrain.errors import UserError

BASE = "data: {train: [x], tokenizer: x}\n"


def load(tmp_path, text, *overrides):
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml", list(overrides))


@pytest.mark.parametrize(
    "text,message",
    [
        (BASE + "train: {steps: 2}\noptimizer: {lr: 1}\ntrain: {seed: 7}\n", "duplicate key 'train' in lines 2 and 4"),
        (BASE + "train:\n  steps: 2\n  seed: 1\n  steps: 3\n", "duplicate key 'steps' in lines 3 and 5"),
        (BASE + "train: {steps: 2, steps: 3}\n", "duplicate key 'steps' in lines 2 and 2"),
    ],
)
def test_a_repeated_key_is_refused_with_both_lines(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


def test_merged_keys_may_be_overridden(tmp_path):
    text = "base: &b {steps: 2, seed: 3}\nrun: {<<: *b, steps: 5}\n"
    (tmp_path / "m.yaml").write_text(text)
    assert read_yaml(tmp_path / "m.yaml", "--config")["run"] == {"steps": 5, "seed": 3}


def test_a_cluster_profile_repeats_none_either(tmp_path, capsys):
    (tmp_path / "k.yaml").write_text("partition: gpu\ntime: 4:00:00\npartition: cpu\n")
    (tmp_path / "c.yaml").write_text(BASE)
    command = ["slurm", "--config", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "r"), "--nodes", "1", "--dry-run"]
    assert launch([*command, "--cluster", str(tmp_path / "k.yaml")]) == 1
    assert capsys.readouterr().err.endswith("k.yaml: duplicate key 'partition' in lines 1 and 3; keep one of them\n")


@pytest.mark.parametrize("text,value", [("010", 10), ("-007", -7), ("0", 0), ("1_000", 1000), ("0x10", 16), ("3e-4", 3e-4),
                                        ("1e3", 1000.0), (".5", 0.5), ("1:30", "1:30"), ("1.0.0", "1.0.0"), ("'010'", "010"),
                                        ("true", True), ("[010, 2.5]", [10, 2.5])])  # fmt: skip
def test_numbers_are_what_they_look_like(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    "setting,message",
    [
        ("optimizer.lr=.nan", "optimizer.lr: nan is not a finite number"),
        ("optimizer.lr='inf'", "optimizer.lr: inf is not a finite number"),
        ("optimizer.weight_decay=-.inf", "optimizer.weight_decay: -inf is not a finite number"),
        ("optimizer.lr=50", "optimizer.lr: 50 is beyond any sense (at most 10)"),
        ("train.steps=true", "train.steps: true is no number"),
        ("train.clip=false", "train.clip: false is no number"),
        ("gist.chunk_sizes=[8, true]", "gist.chunk_sizes: true is no number"),
        ("gist.topk=true", "gist.topk: true is no number"),
        ("train.steps=99999999999999999", "train.steps: 99999999999999999 is beyond any sense"),
        ("parallel.timeout_minutes=1e9", "parallel.timeout_minutes: 1000000000.0 is beyond any sense (at most ten years)"),
        ("checkpoint.stop_after_minutes=1:30", "checkpoint.stop_after_minutes: input should be a valid number"),
        ("model.rope_scaling.factor=.inf", "model.rope_scaling.factor: inf is not a finite number"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(tmp_path, setting, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, BASE, setting)
    assert message in str(caught.value)


def test_what_is_meant_is_taken(tmp_path):
    config = load(tmp_path, BASE, "train.steps=010", "optimizer.lr=3e-4", "checkpoint.background=false", "gist.top_p=0.9")
    assert (config.train.steps, config.optimizer.lr, config.checkpoint.background) == (10, 3e-4, False)
    again = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert parse_config(again) == config, "what a run directory keeps reads the same"


HUGE = "9" * 20
FLAGS = {
    "temperature": (pretrain, "generate --run-dir r --prompt a --temperature nan", "--temperature nan: is not a finite number"),
    "network": (pretrain, "plan --config c --gpus 8 --network inf", "--network inf: is not a finite number"),
    "every": (pretrain, "status r --every nan", "--every nan: is not a finite number"),
    "depths": (pretrain, "evaluate passkey --run-dir r --output o --depths 0 nan", "--depths nan: is not a finite number"),
    "tokens": (pretrain, f"generate --run-dir r --prompt a --max-new-tokens {HUGE}", f"--max-new-tokens {HUGE}: is beyond any"),
    "nodes": (launch, f"slurm --config c --run-dir r --nodes {HUGE}", f"--nodes {HUGE}: is beyond any sense"),
    "where": (prepare, "clean --input x --output o --where score>nan", "--where score>nan: 'nan' is not a number"),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_that_cannot_be_meant_are_refused(flag, capsys):
    main, command, message = FLAGS[flag]
    assert main(command.split()) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_sizes_of_data_preparation(capsys):
    with pytest.raises(SystemExit):
        prepare(["tokenize", "--input", "x", "--tokenizer", "t", "--output", "o", "--workers", "9" * 20])
    assert "is beyond any sense" in capsys.readouterr().err
