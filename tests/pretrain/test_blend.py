"""Blends, thousands of shards, remote shards: what gives a sample, and how fast it is found."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest

from unfold.pretrain.data import windows
from unfold.pretrain.data.blend import Arranged, Blend, Stage, make_blend, parse_entry
from unfold.pretrain.data.samples import TokenSource
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.data.windows import all_shuffled, shuffled
from unfold.pretrain.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny.tokenizer, 2)


def open_source(tokenizer, *entries, raw_tokens=100, cache=""):
    return TokenSource([str(e) for e in entries], raw_tokens, 1, tokenizer, "data.train", cache)


@pytest.mark.parametrize("weights", [(1,), (1, 1), (7, 3), (1, 0, 2), (1, 10, 100, 1000), (5, 4, 3, 2, 1, 0, 9)])
def test_shares_are_exact_and_counters_rise_by_one(weights):
    blend = Blend([Stage(0, weights)])
    counts = [0] * len(weights)
    for n in range(3000):
        assert blend.counters(n) == counts
        source, number = blend.locate(n)
        assert number == counts[source], "nothing repeated, nothing skipped"
        counts[source] += 1
        for share, count in zip(weights, counts):
            assert abs(count - (n + 1) * share / sum(weights)) <= 3


def test_a_change_of_weights_goes_on_where_each_source_was():
    before = make_blend([parse_entry(e, "d") for e in ("a weight=0.7", "b weight=0.3")], "d")
    after = make_blend([parse_entry(e, "d") for e in ("a weight=0.7,500:0.1", "b weight=0.3", "c weight=500:2")], "d")
    assert [after.locate(n) for n in range(500)] == [before.locate(n) for n in range(500)]
    seen = Counter(before.locate(n)[0] for n in range(500))
    first = {}
    for n in range(500, 600):
        source, number = after.locate(n)
        first.setdefault(source, number)
    assert first == {0: seen[0], 1: seen[1], 2: 0}
    assert after.history(500) == before.history(500) and after.history(501) != before.history(501)
    assert after.locate(10**12)[1] > 0, "no walk over what came before"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["a weight=x"], "'x' is not WEIGHT"),
        (["a weight=-1"], "must not be negative"),
        (["a weight=1,5:2,3:1"], "their samples must rise"),
        (["a weight=1", "b"], "b has no weight"),
        (["a weight=0", "b weight=0"], "from sample 0 on every weight is 0"),
        (["a weight=9:1"], "from sample 0 on every weight is 0"),
    ],
)
def test_weights_that_cannot_be(entries, words):
    with pytest.raises(UserError, match=f"data.train: .*{words}"):
        make_blend([parse_entry(e, "data.train") for e in entries], "data.train")


def test_a_blend_of_shards(tiny, tokenizer):
    source = open_source(tokenizer, f"{tiny.train} weight=3", f"{tiny.valid} weight=1")
    alone = [open_source(tokenizer, tiny.train), open_source(tokenizer, tiny.valid)]
    border = len(alone[0]._sources[0].stream(Arranged())._lengths)
    from_valid = [n for n in range(400) if source.segments(n)[0].document >= border]
    assert len(from_valid) == source.counters(400)[1] == 100
    first_epoch = [n for n in range(4 * alone[1].samples_per_epoch) if n in set(from_valid)][: alone[1].samples_per_epoch]
    seen = Counter((p.document, t) for n in first_epoch for p in source.segments(n) for t in range(p.offset, p.offset + p.length))
    assert max(seen.values()) == 1, "an epoch of a source covers it once, whatever the others do"
    piece = source.segments(from_valid[0])
    assert all(p.document >= border for p in piece) and len(source.read(piece)) == 100
    later = open_source(tokenizer, f"{tiny.train} weight=3,40:1", f"{tiny.valid} weight=1")
    assert later.fingerprint_until(40) == source.fingerprint_until(40)
    assert later.fingerprint_until(41) != source.fingerprint_until(41)
    assert [later.segments(n) for n in range(40)] == [source.segments(n) for n in range(40)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_the_order_of_windows_is_a_permutation(size):
    places = [shuffled(i, size, [11, 22, 33, 44]) for i in range(size)]
    assert sorted(places) == list(range(size)) and all_shuffled(size, [11, 22, 33, 44]).tolist() == places
    assert size < 60 or places != sorted(places) and places != [shuffled(i, size, [1, 22, 33, 44]) for i in range(size)]


def test_documents_shuffled_in_runs_still_cover_every_token_once(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "GROUPS", 4)
    source = open_source(tokenizer, tiny.train)
    seen = Counter(
        (p.document, t)
        for n in range(source.samples_per_epoch)
        for p in source.segments(n)
        for t in range(p.offset, p.offset + p.length)
    )
    assert max(seen.values()) == 1 and source.tokens - len(seen) < 100
    assert all(sum(p.length for p in source.segments(n)) == 100 for n in range(2 * source.samples_per_epoch))


def write_many(tiny, directory: Path, count: int) -> None:
    for i in range(count):
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(f"{tiny.valid}{suffix}", directory / f"s{i:05d}{suffix}")


def test_globs(tiny, tokenizer, tmp_path):
    write_many(tiny, tmp_path, 3)
    named = open_source(tokenizer, tmp_path / "s00000", tmp_path / "s00001.bin", tmp_path / "s00002.idx")
    found = open_source(tokenizer, tmp_path / "s0000?")
    assert found.fingerprint == named.fingerprint and found.segments(5) == named.segments(5)
    with pytest.raises(UserError, match=r"data.train: .*nothing\* matches no shard"):
        open_source(tokenizer, tmp_path / "nothing*")


def test_five_thousand_shards_open_in_seconds(tiny, tokenizer, tmp_path):
    write_many(tiny, tmp_path, 5000)
    before = time.process_time()
    source = open_source(tokenizer, tmp_path / "s*")
    assert time.process_time() - before < 5
    assert len(source._shards) == 5000 and len(source.read(source.segments(12345))) == 100


def test_resuming_in_a_late_epoch_is_immediate(tiny, tokenizer):
    source = open_source(tokenizer, tiny.train)
    stream = source._sources[0].stream(Arranged())
    stream._lengths = np.full(3_000_000, 500, np.int32)  # three million documents
    stream._run = 3
    stream._run_tokens = np.full(1_000_000, 1500, np.int64)
    stream.tokens = 3_000_000 * 500
    times = []
    for epoch in (37, 12, 80):
        before = time.process_time()
        assert sum(p.length for p in source.segments(epoch * stream.per_epoch(100) + 123_456)) == 100
        times.append(time.process_time() - before)
    assert min(times) < 0.1


def test_remote_shards_are_fetched_once(tiny, tokenizer, tmp_path):
    memory = fsspec.filesystem("memory")
    for suffix in (".bin", ".idx", ".json"):
        memory.put_file(f"{tiny.train}{suffix}", f"/corpus/web{suffix}")
    source = open_source(tokenizer, "memory://corpus/w*", cache=tmp_path / "cache")
    local = open_source(tokenizer, tiny.train)
    assert source.segments(3) == local.segments(3)
    assert np.array_equal(source.read(source.segments(3)), local.read(local.segments(3)))
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.bin")}
    open_source(tokenizer, "memory://corpus/web", cache=tmp_path / "cache")
    assert kept == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.bin")} and len(kept) == 1
    with pytest.raises(UserError, match="data.train: memory://corpus/none.json cannot be read"):
        open_source(tokenizer, "memory://corpus/none", cache=tmp_path / "cache")
    with pytest.raises(UserError, match="data.train: nosuch://x/y cannot be opened"):
        open_source(tokenizer, "nosuch://x/y", cache=tmp_path / "cache")


def test_ranks_share_one_fetch(tiny, tmp_path):
    """Three processes at once: each gets whole files, and nothing is left half written."""
    code = (
        "import sys, numpy; from unfold.pretrain.data.shards import open_shards;"
        "from unfold.pretrain.data.tokenizer import load_tokenizer;"
        "s = open_shards([sys.argv[1]], load_tokenizer(sys.argv[2], 1), 'data.train', sys.argv[3])[0];"
        "out = numpy.empty(50, numpy.int64); s.read(3, 10, out); print(out.sum())"
    )
    command = [sys.executable, "-c", code, f"file://{tiny.train}", str(tiny.tokenizer), str(tmp_path / "cache")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({rank.communicate()[0] for rank in ranks}) == 1 and not any(rank.returncode for rank in ranks)
    assert not list((tmp_path / "cache").glob("*.partial")) and len(list((tmp_path / "cache").glob("*.bin"))) == 1


def test_an_index_of_other_tokens(tiny, tokenizer, tmp_path):
    write_many(tiny, tmp_path, 1)
    raw = bytearray((tmp_path / "s00000.idx").read_bytes())
    raw[34] ^= 1
    (tmp_path / "s00000.idx").write_bytes(raw)
    with pytest.raises(UserError, match="s00000.idx does not belong to"):
        open_source(tokenizer, tmp_path / "s00000")
    assert json.loads((tmp_path / "s00000.json").read_text())["files"]
