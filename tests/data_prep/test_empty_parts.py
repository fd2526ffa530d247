"""Parts of an array to which no document falls, or none that is held out: they succeed, and the merge judges the whole."""

from __future__ import annotations

import json

import pytest

from tests.data_prep.texts import write_jsonl
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.shards import open_shard
from unfold.pretrain.data.shards import open_shards
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.errors import UserError

LONG = "one long first line " * 100


def make(run, directory, texts, parts, tokenizer, *options):
    """The parts of a corpus; their prefixes."""
    write_jsonl(directory / "c.jsonl", texts)
    command = ("tokenize", "--input", directory / "c.jsonl", "--tokenizer", tokenizer, "--no-plot", *options)
    for i in range(1, parts + 1):
        assert run(*command, "--output", directory / "p", "--part", f"{i}/{parts}")[0] == 0
    return [directory / f"p-{i:05d}-of-{parts:05d}" for i in range(1, parts + 1)], command


def contents(prefix):
    return {kind: prefix.with_name(prefix.name + kind).read_bytes() for kind in (".bin", ".idx", ".json")}


def test_a_part_in_which_no_line_begins(bpe, tmp_path, run, fails):
    prefixes, command = make(run, tmp_path, [LONG, "two", "three"], 3, bpe)
    counts = [json.loads(p.with_name(p.name + ".json").read_text())["documents"] for p in prefixes]
    assert counts[1] == 0 and sum(counts) == 3
    assert run("verify", *prefixes, "--tokenizer", bpe)[0] == 0
    assert run(*command, "--output", tmp_path / "all")[0] == 0
    assert run("merge", "--input", *prefixes, "--output", tmp_path / "merged")[0] == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "all")
    assert "3 documents" in run("stats", *prefixes)[1]
    fails("inspect", prefixes[1], words=("holds no document; it is a part of a corpus",))
    with pytest.raises(DataError, match="holds no document"):
        open_shard(prefixes[1])


def test_a_part_of_which_nothing_is_held_out(bpe, tmp_path, run, fails):
    texts = [f"document {i} of the corpus" for i in range(120)]
    prefixes, command = make(run, tmp_path, texts, 8, bpe, "--valid-fraction", "0.02")
    valid = [f"{prefix}_valid" for prefix in prefixes]
    assert run(*command, "--output", tmp_path / "all")[0] == 0
    assert run("merge", "--input", *valid, "--output", tmp_path / "valid")[0] == 0
    assert contents(tmp_path / "valid") == contents(tmp_path / "all_valid")
    empty = [name for name in valid if not json.loads(open(f"{name}.json").read())["documents"]]
    assert empty, "the case that this is about"
    fails("merge", "--input", *empty, "--output", tmp_path / "none", words=("not one document in", "larger --valid-fraction"))
    assert not list(tmp_path.glob("none*"))


def test_more_parts_than_files(bpe, tmp_path, run):
    (tmp_path / "d.txt").write_text("a text file")
    only = ("tokenize", "--input", tmp_path / "d.txt", "--tokenizer", bpe, "--output", tmp_path / "q")
    for i in (1, 2, 3):
        assert run(*only, "--part", f"{i}/3")[0] == 0, "a picture of no lengths is no reason to fail"
    assert run("merge", "--input", *(tmp_path / f"q-0000{i}-of-00003" for i in (1, 2, 3)), "--output", tmp_path / "m")[0] == 0
    assert run(*only[:-1], tmp_path / "whole")[0] == 0
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def test_empty_parts_of_supervised_data(bpe, tmp_path, run):
    row = {"context": "Polk went to Ohio.", "question": "Where?", "answer": "Ohio"}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    command = ("tokenize-supervised", "--input", tmp_path / "s.jsonl", "--tokenizer", bpe, "--no-plot", "--output")
    for i in (1, 2):
        assert run(*command, tmp_path / "s", "--part", f"{i}/2")[0] == 0
    names = [tmp_path / f"s-0000{i}-of-00002" for i in (1, 2)]
    assert run("verify", *names)[0] == 0 and run("merge", "--input", *names, "--output", tmp_path / "m")[0] == 0
    assert len(open_shard(tmp_path / "m").spans.context) == 1


def test_training_takes_the_parts_by_a_glob(bpe, tmp_path, run):
    prefixes, _ = make(run, tmp_path, [LONG, "two", "three"], 3, bpe)
    tokenizer = load_tokenizer(bpe, 0)
    opened = open_shards([str(tmp_path / "p-*")], tokenizer, "data.train")
    assert [shard.prefix for shard in opened] == [str(prefixes[0]), str(prefixes[2])]
    with pytest.raises(UserError, match="data.train: .*p-00002-of-00003 holds no document"):
        open_shards([str(prefixes[1])], tokenizer, "data.train")
