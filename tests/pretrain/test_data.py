"""Data: the order of samples, micro-batches, and shards that do not fit."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from unfold.model.gist import GistConfig
from unfold.model.visibility import IGNORED
from unfold.pretrain.data.samples import BatchBuilder, TokenSource, step_samples
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny.tokenizer, 2)


def source(tiny, tokenizer, raw_tokens=100, seed=1, prefixes=None):
    return TokenSource([str(p) for p in prefixes or [tiny.train, tiny.valid]], raw_tokens, seed, tokenizer, "data.train")


def test_an_epoch_covers_every_token_once(tiny, tokenizer):
    data = source(tiny, tokenizer)
    seen = Counter()
    for sample in range(data.samples_per_epoch):
        pieces = data.segments(sample)
        assert sum(p.length for p in pieces) == 100
        for p in pieces:
            seen.update((p.document, t) for t in range(p.offset, p.offset + p.length))
    assert max(seen.values()) == 1
    assert data.tokens - len(seen) < 100, "at most the last incomplete window is left out"


def test_order_is_a_pure_function_of_seed_and_number(tiny, tokenizer):
    data, again = source(tiny, tokenizer), source(tiny, tokenizer)
    late = 3 * data.samples_per_epoch + 5
    want = [data.segments(s) for s in (0, 7, late)]
    assert [again.segments(s) for s in (late, 7, 0)][::-1] == want, "independent of what was asked before"
    assert [source(tiny, tokenizer, seed=2).segments(s) for s in (0, 7, late)] != want
    first, second = ([data.segments(e * data.samples_per_epoch + i) for i in range(5)] for e in (0, 1))
    assert first != second, "epochs have different orders"


def test_read_returns_the_documents_tokens(tiny, tokenizer):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = source(tiny, tokenizer)
    shards = [IndexedDataset(str(tiny.train)), IndexedDataset(str(tiny.valid))]
    documents = [np.asarray(shard[i]) for shard in shards for i in range(len(shard))]
    for sample in range(0, data.samples_per_epoch, 7):
        pieces = data.segments(sample)
        want = np.concatenate([documents[p.document][p.offset : p.offset + p.length] for p in pieces])
        assert (data.read(pieces) == want).all()


@pytest.mark.parametrize("chunk_sizes", [None, (8,), (4, 2)])
def test_micro_batches_predict_the_next_raw_token(tiny, tokenizer, chunk_sizes):
    gist = GistConfig(chunk_sizes) if chunk_sizes else None
    data = source(tiny, tokenizer)
    batch = BatchBuilder(data, gist, tokenizer, length_multiple=16).build([3, 4])
    assert batch.ids.shape[1] % 16 == 0
    for row, sample in enumerate([3, 4]):
        pieces = data.segments(sample)
        raw = data.read(pieces)
        is_raw = (batch.layout.level[row] == -1) & (batch.layout.doc[row] >= 0)
        assert batch.ids[row][is_raw].tolist() == raw.tolist()
        want = np.append(raw[1:], IGNORED)
        want[np.cumsum([p.length for p in pieces]) - 1] = IGNORED
        assert batch.labels[row][is_raw].tolist() == want.tolist()
        assert (batch.labels[row][~is_raw] == IGNORED).all()


def test_loss_tokens_do_not_depend_on_chunk_sizes(tiny, tokenizer):
    data = source(tiny, tokenizer)
    counts = [
        int((BatchBuilder(data, gist, tokenizer).build([5]).labels != IGNORED).sum())
        for gist in (None, GistConfig((8,)), GistConfig((2, 2, 2)))
    ]
    assert len(set(counts)) == 1


def test_an_empty_micro_batch_has_no_target(tiny, tokenizer):
    batch = BatchBuilder(source(tiny, tokenizer), GistConfig((4, 2)), tokenizer).empty()
    assert (batch.labels == IGNORED).all() and (batch.layout.doc == -1).all()


@pytest.mark.parametrize("data_size,micro_batch", [(1, 1), (1, 4), (2, 2), (4, 1), (4, 2)])
def test_a_step_sees_the_same_samples_under_every_layout(data_size, micro_batch):
    batches = [step_samples(24, 8, micro_batch, rank, data_size) for rank in range(data_size)]
    assert sorted(s for rank in batches for micro in rank for s in micro) == list(range(24, 32))
    assert all(len(micro) == micro_batch for rank in batches for micro in rank)


def copy_shard(tiny, to):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{tiny.train}{suffix}", f"{to}{suffix}")
    return to


def edit_sidecar(prefix, **changes):
    path = f"{prefix}.json"
    with open(path) as file:
        meta = json.load(file)
    with open(path, "w") as file:
        json.dump(meta | changes, file)


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(file.seek(0, 2) // 2)


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda p: (p.parent / "shard.bin").unlink(), r"shard.bin does not exist"),
        (lambda p: (p.parent / "shard.json").unlink(), r"shard.json does not exist"),
        (lambda p: truncate(f"{p}.bin"), r"shard.bin has \d+ bytes, \d+ were written"),
        (lambda p: truncate(f"{p}.idx"), r"shard.idx has \d+ bytes"),
        (lambda p: truncate(f"{p}.json"), r"shard.json is damaged"),
        (lambda p: edit_sidecar(p, tokenizer_hash="0" * 64), r"another tokenizer \(hash 000000000000"),
        (lambda p: edit_sidecar(p, max_id=512), r"token id 512, the vocabulary has 512 ids"),
    ],
)
def test_damaged_shards_are_named(tiny, tokenizer, tmp_path, damage, message):
    prefix = copy_shard(tiny, tmp_path / "shard")
    assert source(tiny, tokenizer, prefixes=[prefix]).tokens
    damage(prefix)
    with pytest.raises(UserError, match="data.train: .*" + message):
        source(tiny, tokenizer, prefixes=[prefix])


def test_too_little_data(tiny, tokenizer):
    with pytest.raises(UserError, match="less than one sample of data.raw_tokens = 10000000"):
        source(tiny, tokenizer, raw_tokens=10_000_000)


def test_tokenizers_that_do_not_fit(tiny, tmp_path):
    with pytest.raises(UserError, match="gist.chunk_sizes: 5 levels, but the tokenizer .* has 4 gist ids"):
        load_tokenizer(tiny.tokenizer, 5)
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path, 1)
    broken = tmp_path / "broken"
    shutil.copytree(tiny.tokenizer, broken)
    np.save(broken / "word_starts.npy", np.ones(7, bool))
    with pytest.raises(UserError, match=r"word_starts.npy has shape \(7,\)"):
        load_tokenizer(broken, 1)


def test_padding_is_seen_by_nobody(tiny, tokenizer):
    batch = BatchBuilder(source(tiny, tokenizer), GistConfig((4, 2)), tokenizer, length_multiple=64).build([0])
    mask = batch.layout.intervals.dense_mask()[0]
    padding = batch.layout.doc[0] < 0
    assert padding.any()
    assert torch.equal(mask[:, padding].int(), torch.eye(len(mask), dtype=torch.int32)[:, padding])
