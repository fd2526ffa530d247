"""The fast encoder: the same bytes as the exact one, and never used where it might differ."""

import json

import numpy as np
import pytest

from tests.data_prep.texts import TEXTS, contents, fuzz, write_jsonl
from unfold.data_prep import encode
from unfold.data_prep.errors import DataError
from unfold.data_prep.tokenization import fast
from unfold.data_prep.tokenization.fast import FastTokenizer


@pytest.fixture
def command(byte_level, speeches, tmp_path):
    """A tokenize command without its output."""
    pytest.importorskip("gigatoken")
    write_jsonl(tmp_path / "c.jsonl", [*TEXTS, *fuzz(300), *(p.read_text() for p in sorted(speeches.iterdir())[:4])])
    return ("tokenize", "--input", tmp_path / "c.jsonl", "--tokenizer", byte_level, "--no-plot", "--output")


@pytest.mark.parametrize("workers", [1, 2])
def test_same_bytes_whichever_backend_ran(command, tmp_path, run, monkeypatch, workers):
    monkeypatch.setattr(encode, "POOL_BYTES", 0)
    for backend in ("exact", "fast", "auto"):
        status, out, _ = run(*command, tmp_path / backend, "--backend", backend, "--workers", workers)
        assert status == 0 and ("gigatoken (same ids" in out) == (backend != "exact")
    assert contents(tmp_path / "exact") == contents(tmp_path / "fast") == contents(tmp_path / "auto")


def test_an_encoder_that_differs_is_not_used(command, tmp_path, run, fails, monkeypatch):
    honest = FastTokenizer._fast

    def wrong(self, texts):
        ids, lengths = honest(self, texts)
        return np.where(ids == ids.max(initial=0), 0, ids), lengths

    monkeypatch.setattr(FastTokenizer, "_fast", wrong)
    status, out, _ = run(*command, tmp_path / "auto")
    assert status == 0 and "encoder: tokenizers (gigatoken gives other ids" in out
    fails(*command, tmp_path / "fast", "--backend", "fast", words=("--backend fast", "gives other ids"))
    monkeypatch.undo()
    assert run(*command, tmp_path / "exact", "--backend", "exact")[0] == 0
    assert contents(tmp_path / "auto") == contents(tmp_path / "exact")


def test_a_difference_that_shows_later_ends_the_run(command, tmp_path, byte_level, load, monkeypatch):
    tokenizer = FastTokenizer(load(byte_level))
    tokenizer.check(["a sample"])
    honest = FastTokenizer._fast
    monkeypatch.setattr(FastTokenizer, "_fast", lambda self, texts: (honest(self, texts)[0] + 1, honest(self, texts)[1]))
    with pytest.raises(DataError, match="--backend exact"):
        tokenizer.encode_flat(["something else"])


def test_what_it_does_not_do(command, bpe, tmp_path, run, fails, monkeypatch):
    fails("tokenize", "--input", tmp_path / "c.jsonl", "--tokenizer", bpe, "--output", tmp_path / "s", "--backend", "fast",
          words=("--backend fast: it speeds up byte-level BPE only",))  # fmt: skip
    monkeypatch.setattr(fast, "find_spec", lambda name: None)
    fails(*command, tmp_path / "s", "--backend", "fast", words=("pip install gigatoken",))
    status, out, _ = run(*command, tmp_path / "s")
    assert status == 0 and "encoder: tokenizers (the package gigatoken is not installed" in out


def test_its_cache_is_thrown_away_in_time(command, byte_level, load, monkeypatch):
    monkeypatch.setattr(fast, "CACHE_BYTES", 1000)
    started = []
    start = FastTokenizer._start
    monkeypatch.setattr(FastTokenizer, "_start", lambda self: (started.append(1), start(self))[1])
    tokenizer, exact = FastTokenizer(load(byte_level)), load(byte_level)
    for _ in range(10):
        assert np.array_equal(tokenizer.encode_batch(["x y " * 100])[0], exact.encode_batch(["x y " * 100])[0])
    assert len(started) >= 4


def test_literal_control_tokens_are_text(command, byte_level, load):
    tokenizer = FastTokenizer(load(byte_level))
    special = {t["id"] for t in json.loads((byte_level / "tokenizer.json").read_text())["added_tokens"]}
    assert special and not special & set(tokenizer.encode_flat(["a<|endoftext|>b <|pad|>"])[0].tolist())
