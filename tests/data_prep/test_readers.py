"""Corpus files as documents, and the one line that a bad file ends in."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from unfold.data_prep.corpus import readers
from unfold.data_prep.corpus.readers import read_documents
from unfold.data_prep.corpus.sources import find_sources
from unfold.data_prep.errors import DataError


def texts(*inputs, **options) -> list[str]:
    return [d.text for d in read_documents(find_sources([str(i) for i in inputs], **options))]


def test_a_text_file_is_one_document_exactly(tmp_path):
    raw = " \tfirst\r\nsecond é\u2028\n\n"
    (tmp_path / "a.txt").write_bytes(raw.encode())
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfx")
    assert texts(tmp_path / "a.txt", tmp_path / "bom.txt") == [raw, "x"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("separator", ["\n\n", "<|doc|>", "é", "aab", "x"])
@pytest.mark.parametrize(
    "raw",
    [
        "one{s}two{s}{s}four",
        "{s}a{s}",
        "aaab a{s}ab aab\n\n\n",
        "é" * 50 + "{s}" + "日" * 50,
        "x",
        "{s}",
        "a<|doc|",
        "end{s}\n",
    ],
)
def test_separators_in_any_block_size(tmp_path, monkeypatch, block, separator, raw):
    monkeypatch.setattr(readers, "BLOCK", block)
    text = raw.replace("{s}", separator)
    (tmp_path / "a.txt").write_bytes(text.encode())
    expected = text.split(separator)
    assert texts(tmp_path / "a.txt", separator=separator) == (expected if expected[-1] else expected[:-1])


def test_places_name_lines(tmp_path):
    (tmp_path / "a.txt").write_text("1\n2\n\n\n5\n\n7")
    (tmp_path / "b.jsonl").write_text('\n{"text": "x"}\n')
    sources = find_sources([str(tmp_path)], separator="\n\n")
    places = [(d.text, sources[d.source].place(d.line).split("/")[-1]) for d in read_documents(sources)]
    assert places == [("1\n2", "a.txt:1"), ("\n5", "a.txt:4"), ("7", "a.txt:7"), ("x", "b.jsonl:2")]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "text": "b"}',
        '{"text": "x", "n": NaN, "m": -Infinity}',
        '{"text": "x", "n": 123456789012345678901234567890, "f": 1e400}',
        r'{"text": "half \ud83d of a pair"}',
        r'{"text": "whole \ud83d\ude00 nul \u0000"}',
        ' \t{"text": "white space"} \r',
        '{"text": "deep", "n": ' + "[" * 900 + "]" * 900 + "}",
        '{"text": "too deep for one parser", "n": ' + "[" * 2000 + "]" * 2000 + "}",
    ],
)
def test_a_line_reads_as_json_has_it(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line.encode() + b"\n")
    try:
        expected = json.loads(line)["text"]
    except RecursionError:
        with pytest.raises(DataError, match="nested too deeply"):
            texts(tmp_path / "a.jsonl")
    else:
        assert texts(tmp_path / "a.jsonl") == [expected]


def test_jsonl_and_parquet(tmp_path):
    rows = ["plain", "tab\tand\nnewline \U0001f600", "", "\u2028 is no line end"]
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as stream:
        for i, row in enumerate(rows):
            stream.write(json.dumps({"id": i, "text": row}, ensure_ascii=bool(i % 2)) + "\n")
    table = pyarrow.table({"text": rows * 300, "n": range(4 * 300)})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=500)
    assert texts(tmp_path / "a.jsonl") == rows
    assert texts(tmp_path / "b.parquet") == rows * 300
    large = pyarrow.table({"body": pyarrow.array(rows, pyarrow.large_string())})
    pyarrow.parquet.write_table(large, tmp_path / "c.parquet")
    assert texts(tmp_path / "c.parquet", text_key="body") == rows


def test_directories_globs_and_repeats(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a.jsonl", "b/.hidden.txt", "b/notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "json"}' if name.endswith("l") else name)
    assert texts(tmp_path) == ["json", "b/1.txt", "b/2.txt"]
    assert texts(tmp_path / "b" / "*.txt", tmp_path / "b" / "1.txt") == ["b/1.txt", "b/2.txt"]
    assert texts(tmp_path / "**" / "*.txt") == ["b/1.txt", "b/2.txt"]
    assert texts(tmp_path / "b" / "notes.pdf", format="txt") == ["b/notes.pdf"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"one\ntwo\xff\n", ("a.txt:2", "not UTF-8", "0xff")),
        ("a.txt", b"cut \xe2\x82", ("a.txt:1", "not UTF-8")),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', ("a.jsonl:2", "not UTF-8")),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', ("a.jsonl:3", "not valid JSON")),
        ("a.jsonl", b"[" * 100000, ("a.jsonl:1", "not valid JSON")),
        ("a.jsonl", b'["x"]\n', ("a.jsonl:1", "list", "JSON object")),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', ("a.jsonl:1", "no key 'text'", "['body', 'id']", "--text-key")),
        ("a.jsonl", b'{"text": null}\n', ("a.jsonl:1", "'text' is null")),
        ("a.jsonl", b'{"text": 3}\n', ("a.jsonl:1", "'text' is int")),
        ("a.parquet", b"PAR1 not really", ("a.parquet", "not a parquet file")),
        ("a.parquet", b"", ("a.parquet", "not a parquet file")),
        ("a.pdf", b"x", ("a.pdf", "unknown kind", "--format")),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as e:
        texts(tmp_path / name)
    for word in words:
        assert word in str(e.value)
    assert "\n" not in str(e.value)


def test_bad_parquet_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    for key, words in {"text": "no column 'text'", "n": "row 1: 'n' is int", "body": "row 2: 'body' is null"}.items():
        with pytest.raises(DataError, match=words):
            texts(tmp_path / "a.parquet", text_key=key)


def test_damaged_parquet_data(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text number {i} " * 20 for i in range(2000)]}), path)
    raw = bytearray(path.read_bytes())
    raw[4:2000] = b"\xff" * 1996
    path.write_bytes(raw)
    with pytest.raises(DataError, match="a.parquet"):
        texts(path)


def test_inputs_that_name_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, word in {
        "none.txt": "no such file",
        "*.txt": "pattern matches nothing",
        "empty": "no file in this directory",
    }.items():
        with pytest.raises(DataError, match=word):
            find_sources([str(tmp_path / name)])
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match="--document-separator"):
        find_sources([str(tmp_path / "a.jsonl")], separator="x")
