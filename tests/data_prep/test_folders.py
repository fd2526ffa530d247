"""A directory as people have it: what lies beside the corpus is passed over, counted and named."""

from __future__ import annotations

import gzip
import json

import pytest

from unfold.data_prep.corpus.readers import read_documents
from unfold.data_prep.corpus.sources import find_sources
from unfold.data_prep.errors import DataError

ROW = json.dumps({"text": "the corpus"}) + "\n"
BESIDE = {
    ".git/description.txt": "hidden",
    ".ipynb_checkpoints/train-checkpoint.jsonl": "hidden",
    "deep/.cache/a.txt": "hidden",
    ".hidden.txt": "hidden",
    "README.md": "about the data",
    "Readme.zh.md": "about the data",
    "LICENSE.txt": "about the data",
    "dataset_infos.json": "about the data",
    "figure.png": "of unknown kind",
    "pretty.json": "not one JSON object per line",
    "shard.json": "not one JSON object per line",
}
CORPUS = ("a.jsonl", "deep/b.jsonl", "c.txt", "authors.jsonl", "notes.md")


def write(directory, name, content):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_only_the_corpus_is_read(tmp_path):
    for name in BESIDE:
        write(tmp_path, name, "{\n}" if name == "pretty.json" else ROW)
    write(tmp_path, "shard.idx", "")
    for name in CORPUS:
        write(tmp_path, name, ROW)
    for name in ("part-0.json.gz", "part-1.json"):
        (tmp_path / name).write_bytes(gzip.compress(ROW.encode()) if name.endswith("gz") else ROW.encode())
    said = []
    sources = find_sources([str(tmp_path)], say=said.append)
    taken = {str(tmp_path / name) for name in (*CORPUS, "part-0.json.gz", "part-1.json")}
    assert {source.path for source in sources} == taken
    assert len(list(read_documents(sources))) == len(taken)
    (line,) = said
    assert line.startswith(f"{tmp_path}: passed over 4 hidden (.git/description.txt, .hidden.txt, ")
    assert ", and 1 more)" in line and "4 about the data (LICENSE.txt, README.md, " in line
    assert "2 of unknown kind (figure.png, shard.idx)" in line and "2 not one JSON object per line" in line


def test_what_is_named_is_read(tmp_path):
    write(tmp_path, "README.md", "text")
    said = []
    (source,) = find_sources([str(tmp_path / "README.md")], say=said.append)
    assert source.format == "txt" and not said
    with pytest.raises(DataError, match=r"no file in this directory .*passed over 1 about the data \(README.md\)"):
        find_sources([str(tmp_path)])


def test_the_command_says_it(bpe, tmp_path, run):
    write(tmp_path / "in", "README.md", "text")
    write(tmp_path / "in", "a.jsonl", ROW)
    status, _, err = run("tokenize", "--input", tmp_path / "in", "--tokenizer", bpe, "--output", tmp_path / "s", "--no-plot")
    assert status == 0 and f"note: {tmp_path / 'in'}: passed over 1 about the data (README.md)" in err
    assert json.loads((tmp_path / "s.json").read_text())["sources"] == [str(tmp_path / "in" / "a.jsonl")]


def test_an_array_of_rows_is_called_what_it_is(tmp_path):
    write(tmp_path, "a.json", json.dumps([{"text": "a"}], indent=1))
    with pytest.raises(DataError, match="a.json:1: not valid JSON lines: the file is one array; write its entries one a line"):
        list(read_documents(find_sources([str(tmp_path / "a.json")])))
