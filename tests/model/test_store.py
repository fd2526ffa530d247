"""The store of parts: what was read once is not read again, within a limit of bytes in memory and on disk."""

import os

import pytest
import torch

from tests.model.decoding import make_decoder, text
from unfold.model.config import GistConfig
from unfold.model.decode.store import PartStore


@pytest.fixture(scope="module")
def decoder(build):
    return make_decoder(build, GistConfig((4, 2)))


def test_the_least_recently_used_goes_first(decoder):
    texts = [text(40, n) for n in range(4)]
    size = decoder.read_part(texts[0]).bytes
    assert size == 2 * 3 * 2 * 8 * 8 * len(decoder.read_part(texts[0]))  # keys and values, layers, heads, dimensions, fp64
    store = PartStore(decoder, limit=int(2.5 * max(decoder.read_part(t).bytes for t in texts)))
    first = store.get(texts[0])
    assert store.get(list(texts[0])) is first and store.read == 1
    store.get(texts[1])
    store.get(texts[0])  # used again, so that the other one goes
    store.get(texts[2])
    assert store.get(texts[0]) is first and store.read == 3 and store.bytes <= store.limit
    store.get(texts[1])
    assert store.read == 4


def test_what_is_larger_than_the_limit_is_used_and_not_kept(decoder, tmp_path):
    store = PartStore(decoder, decoder.read_part(text(40)).bytes, tmp_path)
    kept = store.get(text(40))
    assert store.get(text(80)).raw == 80 and store.read == 2 and len(list(tmp_path.iterdir())) == 1
    assert store.get(text(40)) is kept and store.get(text(80)).raw == 80 and store.read == 3


def test_a_directory_outlives_the_store(decoder, tmp_path):
    first = PartStore(decoder, directory=tmp_path / "new")
    part = first.get(text(40))
    again = PartStore(decoder, directory=tmp_path / "new")
    loaded = again.get(text(40))
    assert (first.read, again.read) == (1, 0) and all(torch.equal(a, b) for a, b in zip(part.rows, loaded.rows))
    assert again.get(text(41)).raw == 41 and again.read == 1


def test_a_directory_is_held_to_the_limit(decoder, tmp_path):
    other = tmp_path / "notes.safetensors"  # somebody's file of no part
    other.write_bytes(b"x" * 1000)
    store = PartStore(decoder, directory=tmp_path)
    for n in range(2):
        store.get(text(40, n))
    files = sorted((p for p in tmp_path.iterdir() if p != other), key=lambda p: p.stat().st_mtime_ns)
    for age, path in enumerate(files):
        os.utime(path, (1000 + age, 1000 + age))
    small = PartStore(decoder, int(2.5 * files[0].stat().st_size), tmp_path)
    small.get(text(40, 0))  # used now
    small.get(text(40, 2))
    assert other.exists() and files[0].exists() and not files[1].exists() and len(list(tmp_path.iterdir())) == 3


def test_a_file_that_is_damaged_is_named(decoder, tmp_path):
    PartStore(decoder, directory=tmp_path).get(text(40))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"^part {path}: cannot be read .*; remove it"):
        PartStore(decoder, directory=tmp_path).get(text(40))


def test_limits_below_one_byte(decoder):
    with pytest.raises(ValueError, match="^limit: 0 bytes; give at least 1$"):
        PartStore(decoder, 0)
