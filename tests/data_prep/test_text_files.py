"""Text files as editors write them, characters that are none, and what is no file at all."""

from __future__ import annotations

import json
import os

import pytest
import yaml
from tokenizers import AddedToken, Tokenizer, models

from tests.data_prep.texts import contents
from unfold.data_prep.corpus.readers import read_items
from unfold.data_prep.corpus.sources import find_sources
from unfold.data_prep.format.text import encodable, no_file, read_text
from unfold.pretrain.config import load_config

BOM = "\ufeff"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_an_editor_puts_in_front_is_no_text(tmp_path, encoding):
    (tmp_path / "f").write_bytes("größer\r\nals\n".encode(encoding))
    assert read_text(tmp_path / "f") == "größer\nals\n"


def test_a_byte_order_mark_is_no_reason_to_refuse(bpe, tmp_path, run):
    """Lists of inputs, joined jsonl files, templates, JSON beside a tokenizer, configurations."""
    row = json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n"
    (tmp_path / "a.jsonl").write_text(row + row)
    (tmp_path / "b.jsonl").write_text(BOM + row + BOM + row, encoding="utf-8")
    (tmp_path / "t.jinja").write_text(BOM + "{{ messages[0].content }}", encoding="utf-8")
    for name in "ab":
        (tmp_path / f"{name}.list").write_text(f"{tmp_path / name}.jsonl\n", encoding="utf-16" if name == "a" else "utf-8-sig")
        command = ("--input", f"@{tmp_path / name}.list", "--tokenizer", bpe, "--template", tmp_path / "t.jinja", "--no-plot")
        assert run("tokenize", *command, "--output", tmp_path / name)[0] == 0
    assert contents(tmp_path / "a")[".bin"] == contents(tmp_path / "b")[".bin"]
    tree = {"data": {"train": ["x"], "tokenizer": "größer"}}
    (tmp_path / "c.yaml").write_bytes(yaml.safe_dump(tree, allow_unicode=True).encode("utf-8-sig"))
    assert load_config(tmp_path / "c.yaml").data.tokenizer == "größer"


def test_what_is_no_character_is_named():
    assert "half of a surrogate pair (\\ud83d)" in encodable("half \ud83d")
    assert "the byte 0xe9, which is no UTF-8" in encodable("caf\udce9")
    assert encodable("whole \U0001f600") == ""


@pytest.fixture
def without_unknown(tmp_path):
    tokenizer = Tokenizer(models.Unigram([("<|end|>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=None))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    (tmp_path / "u").mkdir()
    tokenizer.save(str(tmp_path / "u" / "tokenizer.json"))
    return tmp_path / "u"


def test_a_character_without_a_token_is_a_reject(without_unknown, tmp_path, run, fails):
    (tmp_path / "c.jsonl").write_text('{"text": "ab"}\n{"text": "a z"}\n{"text": "half \\ud83d"}\n')
    command = ("tokenize", "--input", tmp_path / "c.jsonl", "--tokenizer", without_unknown, "--output", tmp_path / "s")
    fails(*command, words=("c.jsonl:2: the tokenizer cannot encode it",))
    assert run(*command, "--on-error", "skip", "--overwrite")[0] == 0
    rejects = [json.loads(line) for line in (tmp_path / "s.rejects.jsonl").read_text().splitlines()]
    assert [r["place"].rpartition(":")[2] for r in rejects] == ["2", "3"]


@pytest.mark.parametrize("line,words", [('{"text": "half \\ud83d"}', "holds half of a"), ("{", "not valid JSON")])
@pytest.mark.parametrize("command", ["clean", "train-tokenizer"])
def test_other_commands_name_it_too(command, line, words, tmp_path, fails):
    (tmp_path / "c.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    options = ("--vocab-size", 300) if command == "train-tokenizer" else ()
    fails(command, "--input", tmp_path / "c.jsonl", "--output", tmp_path / "o", *options, words=(f"c.jsonl:2: {words}",))


def test_two_columns_of_one_name_are_refused(bpe, tmp_path, fails, run):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "c.csv").write_text("text,id,text\na,1,b\n")
    columns = [pyarrow.array([value]) for value in ("a", "1", "b")]
    table = pyarrow.Table.from_arrays(columns, names=["text", "id", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    for name in ("c.csv", "c.parquet"):
        command = ("tokenize", "--input", tmp_path / name, "--tokenizer", bpe, "--no-plot", "--output", tmp_path / name)
        fails(*command, words=(name, "two columns are called 'text'; rename one"))
        assert run(*command, "--text-key", "id")[0] == 0, "which nobody asked for, may stand there twice"


def test_what_is_no_file_is_called_what_it_is(bpe, tmp_path, fails):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("nowhere.txt")
    command = ("tokenize", "--tokenizer", bpe, "--output", tmp_path / "s", "--input")
    fails(*command, tmp_path / "pipe.txt", words=("pipe.txt: a pipe, which cannot be read from its middle; write what",))
    fails(*command, tmp_path / "link.txt", words=("link.txt: a link to nowhere.txt, which does not exist",))
    fails(*command, "/dev/null", words=("/dev/null: a device",))
    assert no_file(tmp_path) == "a directory, not a file"


@pytest.mark.parametrize("separator,windows", [("\n\n", "\r\n\r\n"), ("\n", "\r\n"), ("\n==\n", "\r\n==\r\n")])
def test_a_separator_among_line_ends_of_windows_is_refused(tmp_path, separator, windows):
    """It would never be found, and all of the file be one document, or every document end in half a line end."""
    path = tmp_path / "a.txt"
    path.write_bytes(f"one{windows}two{windows}".encode())
    items = list(read_items(find_sources([str(path)], separator=separator)))
    assert f"--document-separator {separator!r} means nothing" in items[0].problem and f"or give {windows!r}" in items[0].problem
    of = lambda separator: [(item.text, item.problem) for item in read_items(find_sources([str(path)], separator=separator))]
    assert of(windows) == [("one", ""), ("two", "")]
    path.write_bytes(f"one\r\nmore{separator}two\r{separator}".encode())
    if separator != "\n":  # a line end of Windows elsewhere is text
        assert of(separator)[0] == ("one\r\nmore", "")


def test_bounds_that_leave_nothing_are_refused_before_anything_is_read(bpe, tmp_path, run):
    bounds = ("--min-tokens", 9, "--max-tokens", 3)
    code, _, told = run("tokenize", "--input", tmp_path / "none.txt", "--tokenizer", bpe, "--output", tmp_path / "x", *bounds)
    assert code == 1 and "--min-tokens 9: is above --max-tokens 3" in told
