"""`tokenize` from text to shard and back, through the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.data_prep.texts import CONTROL, TEXTS, contents, fuzz, write_jsonl
from unfold.data_prep import batches
from unfold.data_prep.format.shards import open_shard, write_shard


def test_round_trip(any_tokenizer, load, tmp_path, run, fails):
    texts = [t for t in [*TEXTS, *fuzz(100)] if not t.isspace() and t]
    write_jsonl(tmp_path / "c.jsonl", texts)
    command = ("tokenize", "--input", tmp_path / "c.jsonl", "--tokenizer", any_tokenizer, "--output", tmp_path / "s")
    status, out, err = run(*command)
    assert status == 0 and err == "" and f"{len(texts)} documents" in out and "MB/s" in out
    tokenizer, shard = load(any_tokenizer), open_shard(tmp_path / "s")
    assert shard.info.eos_appended and shard.info.documents == len(texts)
    assert (shard.info.tokenizer_hash, shard.info.vocab_size) == (tokenizer.info.hash, tokenizer.info.vocab_size)
    special = {*tokenizer.info.gist_ids, tokenizer.info.eos_id}
    for i, text in enumerate(texts):
        ids = shard.document(i).tolist()
        assert ids[-1] == tokenizer.info.eos_id and not special & set(ids[:-1])
        assert tokenizer.decode(ids) == (text if tokenizer.info.kind == "huggingface" else text.replace("▁", " "))
    assert run("verify", tmp_path / "s", "--tokenizer", any_tokenizer)[0] == 0
    unended = [[5], [5, tokenizer.info.eos_id]]
    write_shard(tmp_path / "u", unended, tokenizer.info, eos_appended=True)
    fails("verify", tmp_path / "u", "--tokenizer", any_tokenizer, words=("document 0 does not end with id",))


def test_inspect_shows_the_text(bpe, speeches, tmp_path, run, fails):
    assert run("tokenize", "--input", speeches, "--tokenizer", bpe, "--output", tmp_path / "s")[0] == 0
    paths = sorted(speeches.iterdir())
    _, out, _ = run("inspect", tmp_path / "s", "--tokenizer", bpe, "--documents", 2, "--max-chars", 0)
    for path in paths[:2]:
        assert path.read_text(encoding="utf-8") in out
    assert paths[2].read_text(encoding="utf-8") not in out
    _, out, _ = run("inspect", f"{tmp_path / 's'}.bin")
    assert "16 documents" in out and "unigram entropy" in out and "#" in out and "---" not in out
    _, out, _ = run("inspect", tmp_path / "s", "--tokenizer", bpe, "--max-chars", 30)
    assert "more characters]" in out and len(out) < 2000
    fails("inspect", tmp_path / "s", "--documents", 1, words=("--documents 1", "--tokenizer"))


@pytest.mark.parametrize("name", ["bpe", "byte_level"])
def test_files_are_the_same_for_any_number_of_workers(name, request, speeches, tmp_path, run, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 50_000)
    tokenizer = request.getfixturevalue(name)
    results = []
    for workers in (1, 2, 3):
        prefix = tmp_path / f"w{workers}"
        command = ("tokenize", "--input", speeches, "--tokenizer", tokenizer, "--output", prefix)
        assert run(*command, "--workers", workers, "--valid-fraction", 0.3)[0] == 0
        results.append({part: contents(f"{prefix}_{part}") for part in ("train", "valid")})
    assert results[0] == results[1] == results[2]


def test_batch_size_does_not_matter(bpe, speeches, tmp_path, run, monkeypatch):
    command = ("tokenize", "--input", speeches, "--tokenizer", bpe, "--output")
    run(*command, tmp_path / "a")
    monkeypatch.setattr(batches, "BATCH_DOCUMENTS", 1)
    run(*command, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_split_depends_on_the_text_alone(bpe, load, tmp_path, run):
    texts = [f"document number {i}" for i in range(400)]
    parts = []
    for name, order in (("a", texts), ("b", texts[::-1] + texts[:7])):
        write_jsonl(tmp_path / f"{name}.jsonl", order)
        command = ("tokenize", "--input", tmp_path / f"{name}.jsonl", "--tokenizer", bpe, "--output", tmp_path / name)
        assert run(*command, "--valid-fraction", 0.1)[0] == 0
        shards = [open_shard(f"{tmp_path / name}_{part}") for part in ("train", "valid")]
        decode = load(bpe).decode
        parts.append([{decode(s.document(i).tolist()) for i in range(s.info.documents)} for s in shards])
    assert parts[0] == parts[1]
    train, valid = parts[0]
    assert train | valid == set(texts) and not train & valid and 20 <= len(valid) <= 60


def test_empty_documents_are_counted_and_left_out(bpe, tmp_path, run):
    write_jsonl(tmp_path / "c.jsonl", ["a", "", " \n\t", "b"])
    (tmp_path / "d.txt").write_text("")
    command = (
        "tokenize",
        "--input",
        tmp_path / "c.jsonl",
        tmp_path / "d.txt",
        "--tokenizer",
        bpe,
        "--output",
        tmp_path / "s",
    )
    _, out, _ = run(*command)
    assert "2 documents" in out and "read 5 documents (3 empty ones left out)" in out
    assert open_shard(tmp_path / "s").info.documents == 2


def test_no_eos(bpe, byte_level, tmp_path, run, load):
    write_jsonl(tmp_path / "c.jsonl", ["some text"])
    command = ("tokenize", "--input", tmp_path / "c.jsonl", "--tokenizer")
    assert run(*command, bpe, "--output", tmp_path / "a", "--no-eos")[0] == 0
    shard = open_shard(tmp_path / "a")
    assert not shard.info.eos_appended
    assert np.array_equal(shard.document(0), load(bpe).encode_batch(["some text"])[0])
    spec = json.loads((byte_level / "tokenizer.json").read_text())
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    _, out, _ = run(*command, tmp_path / "tokenizer.json", "--output", tmp_path / "b")
    assert "no end-of-document token" in out and not open_shard(tmp_path / "b").info.eos_appended


def test_control_literals_in_every_format(bpe, tmp_path, run, load):
    (tmp_path / "c.txt").write_text(CONTROL + "@@" + CONTROL)
    command = ("tokenize", "--input", tmp_path / "c.txt", "--tokenizer", bpe, "--output", tmp_path / "s")
    assert run(*command, "--document-separator", "@@")[0] == 0
    shard, tokenizer = open_shard(tmp_path / "s"), load(bpe)
    assert shard.info.documents == 2
    for i in range(2):
        ids = shard.document(i)[:-1].tolist()
        assert not set(ids) & set(range(7)) and tokenizer.decode(ids) == CONTROL


def test_refusals(bpe, unigram, speeches, tmp_path, fails, run):
    good = ("tokenize", "--input", speeches, "--tokenizer", bpe, "--output", tmp_path / "s")
    assert run(*good)[0] == 0
    before = contents(tmp_path / "s")
    fails(*good, words=("exists already", "--overwrite"))
    assert contents(tmp_path / "s") == before
    assert run(*good, "--overwrite")[0] == 0 and contents(tmp_path / "s") == before
    fails("verify", tmp_path / "s", "--tokenizer", unigram, words=("another tokenizer",))
    fails("inspect", tmp_path / "s", "--tokenizer", unigram, words=("another tokenizer",))
    start = ("tokenize", "--input", speeches, "--output", tmp_path / "t", "--tokenizer")
    fails(*start, tmp_path / "none", words=("none", "no such file"))
    fails(*start, speeches, words=("holds neither",))
    fails(*start, bpe, "--workers", 0, status=2, words=("--workers",))
    fails(*start, bpe, "--valid-fraction", 1.5, status=2, words=("--valid-fraction", "1.5"))
    fails(*start, bpe, "--valid-fraction", 0.0001, words=("--valid-fraction 0.0001", "t_valid"))
    fails(*start, bpe, "--valid-fraction", 0.9999, words=("--valid-fraction 0.9999", "t_train"))
    fails(*start, bpe, "--document-separator", "", status=2, words=("must not be empty",))
    fails(*start, bpe, "--wrokers", 2, status=2, words=("--wrokers",))
    fails("tokenise", status=2, words=("tokenise",))
    fails(status=2, words=("COMMAND",))
    fails("tokenize", "--input", speeches, "--tokenizer", bpe, "--output", tmp_path, words=("is a directory",))
    (tmp_path / "e.txt").write_text("  ")
    fails(
        "tokenize",
        "--input",
        tmp_path / "e.txt",
        "--tokenizer",
        bpe,
        "--output",
        tmp_path / "t",
        words=("not one document",),
    )
    (tmp_path / "file").write_text("")
    fails("tokenize", "--input", speeches, "--tokenizer", bpe, "--output", tmp_path / "file" / "t", words=("file",))
    assert not list(tmp_path.glob("t*"))


def test_help_and_errors_come_without_heavy_imports():
    code = (
        "import sys; from unfold.data_prep.command import main\n"
        "import unfold.data_prep.encode, unfold.data_prep.tokenization.train, unfold.data_prep.merge, unfold.data_prep.describe\n"
        "heavy = {'torch', 'megatron', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    result = subprocess.run([sys.executable, "-m", "data_prep", "tokenize", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--valid-fraction" in result.stdout
