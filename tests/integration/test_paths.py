"""Paths with blanks, brackets, per cent signs and letters of any kind are taken literally by every command."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml

from tests.conftest import module
from unfold.data_prep.command import main as prepare
from unfold.data_prep.corpus.sources import find_sources
from unfold.launch.command import main as launch
from unfold.pretrain.command import main as pretrain
from unfold.pretrain.data.blend import parse_entry
from unfold.pretrain.data.shards import open_shards
from unfold.pretrain.data.tokenizer import load_tokenizer

NAME = "100% gröẞe [ab] 文 'it' $x #1 %j {0}"
TEXT = "The state of the Union is strong, and the Congress shall meet in December. "


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory of such a name with a corpus, a tokenizer, shards and a run in it."""
    root = tmp_path_factory.mktemp("paths") / NAME
    root.mkdir()
    rows = [json.dumps({"text": f"{TEXT * 4} Number {i}."}) for i in range(60)]
    (root / "corpus [1] a%d.jsonl").write_text("\n".join(rows))
    corpus = root / "corpus [1] a%d.jsonl"
    commands = [
        ["train-tokenizer", "--input", corpus, "--vocab-size", 320, "--output", root / "tok [a]"],
        ["tokenize", "--input", corpus, "--tokenizer", root / "tok [a]", "--output", root / "shard [b] %s"],
        ["verify", root / "shard [b] %s", "--tokenizer", root / "tok [a]"],
        ["stats", root / "shard [b] %s"],
        ["inspect", root / "shard [b] %s", "--tokenizer", root / "tok [a]"],
        ["merge", "--input", root / "shard [b] %s", "--output", root / "merged [c]"],
        ["clean", "--input", corpus, "--output", root / "clean [d].jsonl"],
    ]
    for command in commands:
        assert prepare([str(word) for word in command]) == 0, command
    tree = {
        "precision": "fp32",
        "model": {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_size": 48, "max_position": 512},
        "gist": {"chunk_sizes": [4, 2]},
        "data": {"train": [str(root / "shard [b] %s")], "tokenizer": str(root / "tok [a]"), "raw_tokens": 64},
        "train": {"steps": 2, "global_batch": 2, "valid_samples": 2},
        "monitor": {"wandb": False},
    }
    (root / "conf [e].yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    module("pretrain", "train", "--config", root / "conf [e].yaml", "--run-dir", root / "run [f]")
    return root


COMMANDS = {
    "export": ["export", "--run-dir", "run [f]", "--output", "hf [g]"],
    "import": ["import", "--input", "hf [g]", "--output", "again [h]"],
    "generate": ["generate", "--run-dir", "run [f]", "--prompt-file", "prompt [i].txt", "--max-new-tokens", "2"],
    "perplexity": [
        *"evaluate perplexity --mode dense --length 32 --data".split(),
        "shard [b] %s",
        "--run-dir",
        "run [f]",
        "--output",
        "out [j]",
    ],  # fmt: skip
    "checkpoints": ["checkpoints", "run [f]", "--verify"],
    "report": ["report", "run [f]"],
    "status": ["status", "run [f]"],
}


def inside(root, word):
    return str(root / word) if "[" in word else word


def test_commands_of_a_run(root, capsys):
    (root / "prompt [i].txt").write_text("The state")
    for name, command in COMMANDS.items():
        status = pretrain([inside(root, word) for word in command])
        assert status == 0 or name == "status", f"{name}: {capsys.readouterr().err}"


def test_job_scripts_hold_them_quoted(root, capsys):
    config, run_dir = root / "conf [e].yaml", root / "run [f]"
    options = ["--nodes", "1", "--gpus-per-node", "0", "--dry-run"]
    assert launch(["slurm", "--config", str(config), "--run-dir", str(run_dir), *options]) == 0
    script = capsys.readouterr().out
    assert f"run_dir={shlex.quote(str(run_dir))}" in script
    (output,) = [line for line in script.splitlines() if line.startswith("#SBATCH --output=")]
    assert str(run_dir).replace("%", "%%") in output and output.endswith('-%j.log"')
    assert launch(["local", "--config", str(config), "--run-dir", str(run_dir), "--ranks", "1", "--dry-run"]) == 0
    assert str(config) in shlex.split(capsys.readouterr().out)


def test_a_pattern_is_tried_only_where_no_such_file_exists(root, tmp_path):
    tokenizer = load_tokenizer(root / "tok [a]", 0)
    for name in ("s[1]", "s1"):
        for suffix in (".bin", ".idx", ".json"):
            (tmp_path / f"{name}{suffix}").write_bytes((root / f"shard [b] %s{suffix}").read_bytes())
    found = lambda entry: [shard.prefix for shard in open_shards([str(tmp_path / entry)], tokenizer, "data.train")]
    assert found("s[1]") == [str(tmp_path / "s[1]")] and found("s[12]") == [str(tmp_path / "s1")]
    (tmp_path / "s weight=2.idx").touch()
    assert parse_entry(str(tmp_path / "s weight=2"), "data.train").weights is None
    assert parse_entry(str(tmp_path / "s1 weight=2"), "data.train").weights == ((0, 2.0),)


def test_names_that_look_like_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("@list.txt", "hf:name.txt", "a[b]*.txt"):
        (tmp_path / name).write_text("text")
        (source,) = find_sources([name])
        assert (source.path, source.format) == (name, "txt")
