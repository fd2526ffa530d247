"""Shards: megatron's format byte for byte, and every way in which one can be damaged."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.files import open_partial
from unfold.data_prep.format.shards import ShardWriter, blocks, open_shard, shard_path, token_dtype, write_shard
from unfold.data_prep.verify import verify_shard

DOCUMENTS = [[5, 6, 7], [1], list(range(40)), [99, 0]]


@pytest.fixture
def shard(tmp_path) -> str:
    """Prefix of a small good shard."""
    prefix = str(tmp_path / "s.v1")  # a dot in a prefix is no suffix
    write_shard(prefix, DOCUMENTS, vocab_size=100, tokenizer_hash="abc", sources=["x.txt"])
    return prefix


@pytest.mark.parametrize("vocab_size", [100, 65536, 65537, 300000])
def test_bytes_are_those_of_megatron(tmp_path, vocab_size):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, rng.integers(1, 500)) for _ in range(60)]
    documents[0][0] = vocab_size - 1
    info = write_shard(tmp_path / "ours", documents, vocab_size=vocab_size)
    dtype = token_dtype(vocab_size)
    assert info.dtype == dtype.name == ("uint16" if vocab_size <= 65536 else "int32")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == 60
    for i, document in enumerate(documents):
        assert np.array_equal(np.array(dataset[i]), document)


def test_sidecar(shard):
    sidecar = json.loads(shard_path(shard, ".json").read_text())
    flat = np.concatenate([np.array(d) for d in DOCUMENTS])
    p = np.bincount(flat)[np.bincount(flat) > 0] / len(flat)
    assert sidecar["format"] == 1 and sidecar["dtype"] == "uint16" and sidecar["vocab_size"] == 100
    assert (sidecar["documents"], sidecar["tokens"], sidecar["max_id"]) == (4, 46, 99)
    assert math.isclose(sidecar["unigram_entropy_nats"], float(-(p * np.log(p)).sum()))
    assert (sidecar["tokenizer_hash"], sidecar["eos_appended"], sidecar["sources"]) == ("abc", False, ["x.txt"])
    assert sidecar["files"]["bin"]["bytes"] == 92 and len(sidecar["files"]["idx"]["sha256"]) == 64


def test_documents_come_back(shard):
    opened = open_shard(shard)
    assert [opened.document(i).tolist() for i in range(4)] == DOCUMENTS
    for size in (1, 4, 1000):
        pieces = list(blocks(opened, size))
        assert np.concatenate([ids for ids, _ in pieces]).tolist() == sum(DOCUMENTS, [])
        assert np.concatenate([lengths for _, lengths in pieces]).tolist() == [3, 1, 40, 2]


@pytest.mark.parametrize(
    ("documents", "word"),
    [
        ([[1], [100]], "token id 100"),
        ([[65536]], "token id 65536"),
        ([[-1]], "token id -1"),
        ([[1], []], "0 tokens"),
        ([], "not one"),
    ],
)
def test_what_does_not_fit_is_never_written(tmp_path, documents, word):
    with pytest.raises(DataError, match=word):
        write_shard(tmp_path / "s", documents, vocab_size=100)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_then_replaced(shard):
    before = {s: shard_path(shard, s).read_bytes() for s in (".bin", ".idx", ".json")}
    with pytest.raises(DataError, match="exists already"):
        write_shard(shard, [[1]], vocab_size=100)
    assert before == {s: shard_path(shard, s).read_bytes() for s in before}
    write_shard(shard, [[1]], vocab_size=100, overwrite=True)
    assert open_shard(shard).info.tokens == 1 and verify_shard(shard)[1] == []


def test_failure_leaves_the_old_shard_alone(shard):
    with pytest.raises(DataError):
        write_shard(shard, [[1], [1000]], vocab_size=100, overwrite=True)
    assert verify_shard(shard)[1] == [] and open_shard(shard).info.tokens == 46


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_replacement_cut_off_between_its_files_is_no_shard(shard, monkeypatch, survivors):
    replaced = []

    def replace(source, target):
        if len(replaced) == survivors:
            raise OSError("no more")
        replaced.append(target)
        os.rename(source, target)

    monkeypatch.setattr("unfold.data_prep.format.files.os.replace", replace)
    with pytest.raises(OSError, match="no more"):
        write_shard(shard, [[1]], vocab_size=100, overwrite=True)
    assert verify_shard(shard)[1] != [] and not shard_path(shard, ".bin.partial").exists()


def test_two_writers_of_one_output(tmp_path):
    options = {"vocab_size": 10, "tokenizer_hash": "", "eos_appended": False}
    with ShardWriter(str(tmp_path / "s"), **options) as first:
        with pytest.raises(DataError, match="another run is writing"):
            ShardWriter(str(tmp_path / "s"), **options)
        first.append(np.array([1, 2]), np.array([2]))
        first.finish()
    assert verify_shard(str(tmp_path / "s"))[1] == []


def test_leftovers_of_a_killed_run_do_no_harm(tmp_path):
    code = (
        "import os, numpy as np; from unfold.data_prep.format.shards import ShardWriter;"
        f"w = ShardWriter({str(tmp_path / 's')!r}, vocab_size=10, tokenizer_hash='', eos_appended=False);"
        "w.append(np.arange(10).repeat(9999), np.array([99990])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == ["s.bin.partial"]
    info = write_shard(tmp_path / "s", [[1, 2]], vocab_size=10)
    assert info.files["bin"]["bytes"] == 4 and verify_shard(str(tmp_path / "s"))[1] == []
    assert len(list(tmp_path.iterdir())) == 3


def test_a_partial_file_renamed_meanwhile_is_not_truncated(tmp_path):
    """The other run finishes between this one's opening of the partial file and its lock."""
    target = tmp_path / "x.bin"
    with open_partial(target) as stream:
        stream.write(b"data")
        stream.flush()
        os.replace(tmp_path / "x.bin.partial", target)
        with open_partial(target) as other:
            assert os.fstat(other.fileno()).st_ino != os.stat(target).st_ino
    assert target.read_bytes() == b"data"


def cut(path, size):
    os.truncate(path, size)


def flip(path, offset, value=0xFF):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= value
    path.write_bytes(raw)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGES = {
    "bin missing": (".bin", lambda p: p.unlink(), ".bin: missing"),
    "idx missing": (".idx", lambda p: p.unlink(), ".idx: missing"),
    "sidecar missing": (".json", lambda p: p.unlink(), ".json: no such file"),
    "bin cut short": (".bin", lambda p: cut(p, 90), "90 bytes, but its index calls for 92; cut short"),
    "bin cut inside a token": (".bin", lambda p: cut(p, 91), "cut short"),
    "bin empty": (".bin", lambda p: cut(p, 0), "cut short"),
    "bin too long": (".bin", lambda p: p.write_bytes(p.read_bytes() + b"xx"), "too long"),
    "idx cut short": (".idx", lambda p: cut(p, 100), ".idx: 100 bytes, but its header calls for"),
    "idx header cut": (".idx", lambda p: cut(p, 20), "before the end of its header"),
    "idx of nothing": (".idx", lambda p: cut(p, 0), "before the end of its header"),
    "idx magic": (".idx", lambda p: flip(p, 0), "not an index"),
    "idx dtype": (".idx", lambda p: flip(p, 17, 0x0C), "dtype code 4 is not that of uint16"),
    "idx count": (".idx", lambda p: flip(p, 18), "its header calls for"),
    "idx length": (".idx", lambda p: flip(p, 34), "offsets do not follow"),
    "idx offset": (".idx", lambda p: flip(p, 34 + 16 + 8), "offsets do not follow"),
    "one bit": (".bin", lambda p: flip(p, 0, 1), "sha256"),
    "id beyond vocabulary": (".bin", lambda p: flip(p, 1), "does not fit the vocabulary of 100"),
    "sidecar no json": (".json", lambda p: cut(p, 40), "not valid JSON"),
    "sidecar of another thing": (".json", lambda p: p.write_text("[]"), "not the sidecar"),
    "sidecar without tokens": (".json", lambda p: p.write_text('{"format": 1}'), "misses"),
    "sidecar ill-typed": (".json", lambda p: edit(p, tokens="46"), "wrong value for tokens"),
    "sidecar files": (".json", lambda p: edit(p, files={"bin": 3}), "wrong value for files"),
    "sidecar tokens": (".json", lambda p: edit(p, tokens=45), "46 tokens, but the sidecar names"),
    "sidecar max_id": (".json", lambda p: edit(p, max_id=3), "max_id 3"),
    "sidecar vocab": (".json", lambda p: edit(p, vocab_size=50), "token id 99 does not fit the vocabulary of 50"),
    "sidecar entropy": (".json", lambda p: edit(p, unigram_entropy_nats=1.0), "unigram_entropy_nats"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds(damage, shard, run):
    suffix, harm, expected = DAMAGES[damage]
    harm(shard_path(shard, suffix))
    status, out, err = run("verify", shard)
    assert status == 1 and out == ""
    assert expected in err and all(line.startswith("data_prep: error: ") for line in err.splitlines())


@pytest.mark.parametrize("damage", ["bin missing", "bin cut short", "idx cut short", "sidecar missing", "idx length"])
def test_inspect_and_merge_refuse(damage, shard, fails, tmp_path):
    suffix, harm, expected = DAMAGES[damage]
    harm(shard_path(shard, suffix))
    fails("inspect", shard, words=(expected,))
    fails("merge", "--input", shard, "--output", tmp_path / "m", words=(expected,))
    assert not list(tmp_path.glob("m.*"))


def test_verify_names_each_shard(shard, tmp_path, run):
    write_shard(tmp_path / "b", [[1]], vocab_size=100)
    cut(tmp_path / "b.bin", 1)
    status, out, err = run("verify", shard + ".idx", tmp_path / "b", tmp_path / "none")
    assert status == 1
    assert out == f"{shard}: OK, 4 documents, 46 tokens\n"
    assert len(err.splitlines()) == 2 and "none: no such shard" in err


def test_merge(shard, tmp_path, run, fails):
    write_shard(tmp_path / "b", [[3], [4, 5]], vocab_size=100, tokenizer_hash="abc", sources=["x.txt", "y.txt"])
    status, out, _ = run("merge", "--input", shard, tmp_path / "b.bin", "--output", tmp_path / "m")
    assert status == 0 and "6 documents, 49 tokens" in out
    write_shard(tmp_path / "whole", [*DOCUMENTS, [3], [4, 5]], vocab_size=100, tokenizer_hash="abc", sources=["x.txt", "y.txt"])
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"m{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    fails("merge", "--input", shard, "--output", tmp_path / "m", words=("exists already",))
    fails("merge", "--input", shard, "--output", shard, "--overwrite", words=("is an input of this merge",))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"vocab_size": 100, "tokenizer_hash": "other"}, "tokenizer_hash is other"),
        ({"vocab_size": 70000, "tokenizer_hash": "abc"}, "vocab_size is 70000"),
        ({"vocab_size": 100, "tokenizer_hash": "abc", "eos_appended": True}, "eos_appended is True"),
    ],
)
def test_merge_refuses_what_differs(shard, tmp_path, fails, options, word):
    write_shard(tmp_path / "b", [[3]], **options)
    fails("merge", "--input", shard, tmp_path / "b", "--output", tmp_path / "m", words=(f"{tmp_path / 'b'}: {word}",))
    assert not list(tmp_path.glob("m.*"))


def test_random_bytes_never_end_in_a_traceback(shard, run):
    rng = np.random.default_rng(0)
    for suffix in (".bin", ".idx", ".json"):
        path = shard_path(shard, suffix)
        good = path.read_bytes()
        for _ in range(60):
            flip(path, int(rng.integers(len(good))), int(rng.integers(1, 256)))
            if suffix == ".json" and json_equal(path.read_bytes(), good):
                continue
            status, _, err = run("verify", shard)
            assert status == 1 or suffix == ".json" and "sources" in json.loads(path.read_text()), err
            path.write_bytes(good)


def json_equal(a: bytes, b: bytes) -> bool:
    """Whether two texts say the same (a flipped blank does not count)."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_inspect_puts_gists_in(bpe, tmp_path, run, fails):
    (tmp_path / "a.txt").write_text("the people of the United States and the Congress of the United States of America " * 3)
    assert run("tokenize", "--input", tmp_path / "a.txt", "--tokenizer", bpe, "--output", tmp_path / "s")[0] == 0
    plain = run("inspect", tmp_path / "s", "--tokenizer", bpe)[1]
    status, out, _ = run("inspect", tmp_path / "s", "--tokenizer", bpe, "--chunk-sizes", "4,2")
    assert status == 0 and re.sub("<gist[01]>", "", out) == plain
    text = out.split("tokens\n")[-1]
    words = re.findall("<gist[01]>", text)
    assert words.count("<gist1>") == words.count("<gist0>") // 2 > 1
    # sinks and a chunk of four, longer only where a word would be cut: each gist stands before a space
    assert all(text[m.end()] in " <\n" for m in re.finditer("<gist[01]>", text))
    (tmp_path / "b.txt").write_text("quixotic zymurgy, abracadabra; " * 9)
    assert run("tokenize", "--input", tmp_path / "b.txt", "--tokenizer", bpe, "--output", tmp_path / "t")[0] == 0
    shown = [
        run("inspect", tmp_path / "t", "--tokenizer", bpe, "--chunk-sizes", "4", *more)[1] for more in ([], ["--no-word-aware"])
    ]
    assert re.sub("<gist0>", "", shown[0]) == re.sub("<gist0>", "", shown[1])
    assert shown[1].count("<gist0>") == (open_shard(tmp_path / "t").info.tokens - 3) // 4 > shown[0].count("<gist0>")
    fails("inspect", tmp_path / "s", "--tokenizer", bpe, "--no-word-aware", words=("--no-word-aware: needs --chunk-sizes",))
    fails("inspect", tmp_path / "s", "--chunk-sizes", "8", words=("--chunk-sizes 8: needs --tokenizer",))
    assert run("inspect", tmp_path / "s", "--tokenizer", bpe, "--chunk-sizes", "8,x")[0] == 2
