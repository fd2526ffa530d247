"""Every kind of input: csv, arrow, datasets, compression, conditions; what is broken is named, or skipped and listed."""

import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from tests.data_prep.texts import write_jsonl
from unfold.data_prep.corpus import columnar
from unfold.data_prep.corpus.conditions import parse_condition
from unfold.data_prep.corpus.items import Position
from unfold.data_prep.corpus.readers import read_documents, read_items
from unfold.data_prep.corpus.sources import find_sources, split_sources
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.shards import open_shard

ROWS = ["plain", "tab\tand\nnewline \U0001f600", 'a,b "quoted"', "\u2028 is no line end", " ", "x" * 700] * 50


def write_zst(path, raw: bytes) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(raw)


PACK = {
    "": lambda path, raw: path.write_bytes(raw),
    ".gz": lambda path, raw: path.write_bytes(gzip.compress(raw)),
    ".xz": lambda path, raw: path.write_bytes(lzma.compress(raw)),
    ".zst": write_zst,
}


def csv_bytes() -> bytes:
    def field(text):
        return '"' + text.replace('"', '""') + '"'

    return ("id,text\r\n" + "".join(f"{i},{field(t)}\r\n" for i, t in enumerate(ROWS))).encode()


def jsonl_bytes() -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(ROWS)).encode()


def arrow_bytes(stream: bool) -> bytes:
    table = pyarrow.table({"id": range(len(ROWS)), "text": ROWS})
    sink = pyarrow.BufferOutputStream()
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return sink.getvalue().to_pybytes()


def parquet_bytes() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(ROWS)), "text": ROWS}), sink, row_group_size=64)
    return sink.getvalue().to_pybytes()


MADE = {
    "a.jsonl": jsonl_bytes,
    "a.csv": csv_bytes,
    "a.parquet": parquet_bytes,
    "a.arrow": lambda: arrow_bytes(True),
    "file.arrow": lambda: arrow_bytes(False),
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", MADE)
def test_every_format_and_compression_gives_the_same_texts_from_anywhere(tmp_path, name, suffix):
    path = tmp_path / (name + suffix)
    PACK[suffix](path, MADE[name]())
    sources = find_sources([str(path)])
    whole = list(read_items(sources))
    assert [d.text for d in whole] == ROWS and not any(d.problem for d in whole)
    assert all(d.consumed <= sources[0].size for d in whole) and whole[-1].consumed > 0
    for i in (0, 1, 63, 64, 70, 255, 298):
        rest = list(read_items(sources, whole[i].after))
        assert [d.text for d in rest] == ROWS[i + 1 :]
        assert [d.line for d in rest] == [d.line for d in whole[i + 1 :]]


@pytest.mark.parametrize("suffix", PACK)
def test_separated_texts_from_anywhere(tmp_path, suffix):
    PACK[suffix](tmp_path / f"a.txt{suffix}", b"one\n==\ntwo\n\n==\n\n==\nthree" * 40)
    sources = find_sources([str(tmp_path)], separator="\n==\n")
    whole = list(read_items(sources))
    for i in (0, 1, 2, 50):
        assert [d[:3] for d in read_items(sources, whole[i].after)] == [d[:3] for d in whole[i + 1 :]]


def test_datasets_on_disk_and_streamed(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": ROWS, "id": list(range(len(ROWS)))})
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    assert [d.text for d in read_documents(find_sources([str(tmp_path / "saved")]))] == ROWS
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="name one of its splits"):
        find_sources([str(tmp_path / "both")])
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes(jsonl_bytes())
    sources = find_sources([f"hf:{tmp_path / 'hub'}:train"])
    assert [d.text for d in read_documents(sources)] == ROWS
    assert [d.text for d in read_documents(sources, Position(0, 290, 291))] == ROWS[290:]
    with pytest.raises(DataError, match="hf:.*nowhere.*the dataset cannot be read"):
        list(read_documents(find_sources([f"hf:{tmp_path / 'nowhere'}"])))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"id,text\n1,x\n2\n", "a.csv:3: 1 fields, but the first line names 2"),
        ("a.csv", b'id,text\n1,"x\ny"\n2,z,3\n', "a.csv:4: 3 fields"),
        ("a.csv", b"id,body\n1,x\n", "a.csv:2: no key 'text'; name one of .'body', 'id'"),
        ("a.csv", b'text\n"never\nclosed\n', "a.csv:2: not valid CSV: unexpected end of data"),
        ("a.csv", b"text\nok\n\xff\n", "a.csv:3: not UTF-8"),
        ("a.arrow", b"nothing of the kind", "a.arrow, row 1: not an arrow file"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz:1: cut short or damaged as a .gz file"),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst:1: cut short or damaged as a .zst file"),
        ("a.txt.xz", b"no xz", "a.txt.xz:1: cut short or damaged as a .xz file"),
        ("a.jsonl", b'{"text": 1' + b"0" * 6000 + b"}", "a.jsonl:1: not valid JSON: Exceeds the limit"),
    ],
)
def test_bad_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as e:
        list(read_documents(find_sources([str(tmp_path / name)])))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet"])
def test_truncated_files_keep_what_came_before(tmp_path, name, suffix):
    path = tmp_path / (name + suffix)
    PACK[suffix](path, MADE.get(name, lambda: os.urandom(50_000).hex().encode())() * (1 if name == "a.parquet" else 40))
    whole = [d for d in read_items(find_sources([str(path)])) if not d.problem]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    items = list(read_items(find_sources([str(path)])))
    assert "cut short or damaged" in items[-1].problem or "not a parquet" in items[-1].problem
    assert [d.text for d in items[:-1] if not d.problem] == [d.text for d in whole][: len(items) - 1]


def test_lines_beyond_the_limit_are_passed_over_in_bounded_memory(tmp_path):
    long = b'{"text": "' + b"x" * 5_000_000 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + long + b'{"text": "b"}\n')
    (tmp_path / "b.csv").write_bytes(b"text\na\n" + long.replace(b'"', b"") + b"b\n")
    (tmp_path / "c.txt").write_bytes(b"a==" + long + b"==b")
    (tmp_path / "d.txt").write_bytes(long)
    write_zst(tmp_path / "e.jsonl.zst", (tmp_path / "a.jsonl").read_bytes())
    sources = find_sources([str(tmp_path)], limit=1000, separator="==")
    found = [(os.path.basename(sources[d.source].path), d.line, d.text or d.problem[:26]) for d in read_items(sources)]
    assert found == [
        ("a.jsonl", 1, "a"), ("a.jsonl", 2, "a document of 5,000,013 by"), ("a.jsonl", 3, "b"),
        ("b.csv", 2, "a"), ("b.csv", 3, "a document of 5,000,009 by"), ("b.csv", 4, "b"),
        ("c.txt", 1, "a"), ("c.txt", 1, "a document of 5,000,013 by"), ("c.txt", 2, "b"),
        ("d.txt", 1, "a document of 5,000,013 by"),
        ("e.jsonl.zst", 1, "a"), ("e.jsonl.zst", 2, "a document of 5,000,013 by"), ("e.jsonl.zst", 3, "b"),
    ]  # fmt: skip
    table = pyarrow.table({"text": ["a", "x" * 5000, "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    found = [d.text or d.problem[:20] for d in read_items(find_sources([str(tmp_path / "f.parquet")], limit=1000))]
    assert found == ["a", "a document of 5,000 ", "b"]


def test_conditions(tmp_path):
    values = [("en", 0.9, True), ("de", 0.2, False), ("en", 0.1, True), (None, None, False)]
    rows = [{"text": f"t{i}", "lang": lang, "meta": {"score": score}, "ok": ok} for i, (lang, score, ok) in enumerate(values)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    def texts(name, *conditions):
        sources = find_sources([str(tmp_path / name)], where=[parse_condition(c) for c in conditions])
        return [d.text for d in read_documents(sources)]

    for name in ("a.jsonl", "a.parquet"):
        assert texts(name, "lang=en") == ["t0", "t2"]
        assert texts(name, "lang!=en") == ["t1", "t3"]
        assert texts(name, "meta.score>=0.2") == ["t0", "t1"]
        assert texts(name, "lang = en", "meta.score<0.5") == ["t2"]
        assert texts(name, "ok=true", "meta.score>0.5") == ["t0"]
        with pytest.raises(DataError, match="row 1|a.jsonl:1"):
            texts(name, "lang>3")
    with pytest.raises(DataError, match="no column 'absent'"):
        texts("a.parquet", "absent=1")
    for bad in ("lang", "=x", "score>high"):
        with pytest.raises(DataError, match=f"--where {bad}"):
            parse_condition(bad)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(DataError, match="text files have no fields"):
        find_sources([str(tmp_path / "b.txt")], where=[parse_condition("a=b")])


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_parts_cover_everything_once(tmp_path, parts):
    for name, texts in {"a": ROWS[:9], "b": ["only"], "c": ROWS[:40]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    (tmp_path / "d.txt").write_text("t" * 500)
    sources = find_sources([str(tmp_path)])
    want = [(d.text, sources[d.source].place(d.line)) for d in read_documents(sources)]
    got = []
    for i in range(1, parts + 1):
        mine = split_sources(sources, i, parts)
        got += [(d.text, mine[d.source].place(d.line)) for d in read_documents(mine)]
        middle = [d.after for d in read_documents(mine)][:1]
        assert not middle or len(list(read_documents(mine, middle[0]))) == len(list(read_documents(mine))) - 1
    assert got == want


def test_skipped_documents_are_counted_and_listed(bpe, byte_level, tmp_path, run):
    good = [json.dumps({"text": f"good {i}"}) for i in range(6)]
    bad = ["{", '{"body": 1}', '{"text": "half \\ud83d"}', '{"text": null}', '{"text": "' + "x" * (1 << 20) + '"}']
    raw = "\n".join(x for pair in zip(good, [*bad, ""]) for x in pair).encode() + b'\n{"text": "\xff"}\n'
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(os.urandom(3000).hex().encode())[:-30])
    (tmp_path / "c.txt").write_text("the last")
    files = [tmp_path / n for n in ("a.jsonl", "b.jsonl.gz", "c.txt")]
    results = []
    for tokenizer in (bpe, byte_level):
        for workers in (1, 2):
            prefix = tmp_path / f"{tokenizer.name}{workers}"
            options = ("--on-error", "skip", "--max-document-mb", 1, "--workers", workers, "--no-plot", "--output", prefix)
            status, out, err = run("tokenize", "--input", *files, "--tokenizer", tokenizer, *options)
            assert status == 0 and err == "" and "7 documents could not be used" in out
            entries = [json.loads(line) for line in open(f"{prefix}.rejects.jsonl")]
            results.append([e["place"].removeprefix(f"{tmp_path}/") for e in entries])
            report = json.load(open(f"{prefix}.report.json"))
            assert report["rejected"] == 7 and report["documents"] == 14 and open_shard(prefix).info.documents == 7
    assert results == [[*(f"a.jsonl:{n}" for n in (2, 4, 6, 8, 10, 13)), "b.jsonl.gz:1"]] * 4


def test_length_limits_are_counted(bpe, tmp_path, run, fails):
    write_jsonl(tmp_path / "a.jsonl", ["a", "b c d e f", "the " * 300, ""])
    options = ("--input", tmp_path / "a.jsonl", "--tokenizer", bpe, "--output", tmp_path / "s")
    status, out, _ = run("tokenize", *options, "--min-tokens", 3, "--max-tokens", 100)
    assert status == 0 and "1 empty ones left out, 1 too short, 1 too long" in out
    report = json.load(open(tmp_path / "s.report.json"))
    assert (report["short"], report["long"], report["empty"]) == (1, 1, 1)
    assert open_shard(tmp_path / "s").info.documents == 1
    assert (tmp_path / "s.report.png").read_bytes().startswith(b"\x89PNG")
    fails("tokenize", *options, "--overwrite", "--min-tokens", 9999, words=("4 documents: 1 empty, 3 too short",))


def test_arrow_rows_are_taken_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "ROWS", 7)
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(True))
    assert [d.text for d in read_documents(find_sources([str(tmp_path / "a.arrow")]))] == ROWS


def test_a_list_names_inputs(tmp_path, fails):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    names = tmp_path / "inputs.list"
    names.write_text(f"# a comment\n{tmp_path}/a.txt\n\n{tmp_path}/*.jsonl\n")
    found = find_sources([f"@{names}", str(tmp_path / "a.txt")])
    assert [(s.path, s.format) for s in found] == [(f"{tmp_path}/a.txt", "txt"), (f"{tmp_path}/b.jsonl", "jsonl")]
    names.write_text(f"{tmp_path}/a.txt\n{tmp_path}/gone.txt\n")
    with pytest.raises(DataError, match=f"{names}:2: {tmp_path}/gone.txt: no such file"):
        find_sources([f"@{names}"])
    names.write_text("# nothing\n")
    with pytest.raises(DataError, match="names nothing"):
        find_sources([f"@{names}"])
    with pytest.raises(DataError, match="list of inputs cannot be read"):
        find_sources([f"@{tmp_path}/none.list"])
