"""Supervised shards in training: whole documents packed, labels at answers only, suffixes that recall, damaged files."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from tests.supervised import make_shard
from unfold.model.gist import GistConfig
from unfold.model.visibility import IGNORED
from unfold.pretrain.config import load_config
from unfold.pretrain.data.blend import Stretch
from unfold.pretrain.data.packing import pack
from unfold.pretrain.data.samples import BatchBuilder, TokenSource
from unfold.pretrain.data.shards import open_shards
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.report.sample import read_sample

R = 256


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny.tokenizer, 2)


@pytest.fixture(scope="module")
def shard(tiny, tmp_path_factory):
    return make_shard(tiny, tmp_path_factory.mktemp("supervised") / "s", 150)


@pytest.fixture(scope="module")
def reference(shard):
    """What data_prep says is in the shard: ids, context and ranges of each document."""
    from unfold.data_prep.format.shards import open_shard

    opened = open_shard(shard)
    spans = [opened.spans[i : i + 1] for i in range(opened.info.documents)]
    return [(opened.document(i).tolist(), int(s.context[0]), s.ranges.tolist()) for i, s in enumerate(spans)]


def source(tokenizer, *prefixes, raw_tokens=R, seed=1):
    return TokenSource([str(p) for p in prefixes], raw_tokens, seed, tokenizer, "data.train")


def test_an_epoch_holds_every_document_once_and_whole(shard, tokenizer, reference):
    data = source(tokenizer, shard)
    for epoch in range(2):
        samples = range(epoch * data.samples_per_epoch, (epoch + 1) * data.samples_per_epoch)
        pieces = [data.segments(s) for s in samples]
        assert all(0 < sum(p.length for p in own) <= R for own in pieces)
        flat = list(itertools.chain(*pieces))
        assert sorted(p.document for p in flat) == list(range(len(reference)))
        assert all(p.offset == 0 and p.length == len(reference[p.document][0]) for p in flat)
        assert max(map(len, pieces)) == data.closed
    assert data.tokens / (data.samples_per_epoch * R) > 0.85, "two or three documents fill a window"


def test_order_is_a_pure_function_of_seed_and_number(shard, tokenizer):
    data, again = source(tokenizer, shard), source(tokenizer, shard)
    late = 5 * data.samples_per_epoch + 3
    want = [data.segments(s) for s in (0, 7, late)]
    assert [again.segments(s) for s in (late, 7, 0)][::-1] == want, "independent of what was asked before"
    assert [source(tokenizer, shard, seed=2).segments(s) for s in (0, 7, late)] != want
    first, second = ([data.segments(e * data.samples_per_epoch + i) for i in range(9)] for e in (0, 1))
    assert first != second, "epochs have different orders"


def test_stages_of_other_lengths_read_every_document_once(shard, tokenizer, reference):
    """What the first length left is packed for the second one; every sample fits its stage's length."""
    stretches = [Stretch(0, 20, R), Stretch(20, None, 2 * R)]
    builders = [BatchBuilder(source(tokenizer, shard), GistConfig((4, 2)), tokenizer).along(stretches, i) for i in range(2)]
    read, number = [], 0
    while len(read) < len(reference):
        builder = builders[number >= 20]
        read += builder.source.segments(number)
        layout = builder.build([number]).layout
        assert (
            layout.doc.shape[1] == builder.length and int((layout.level < 0)[layout.doc >= 0].sum()) <= (1 + (number >= 20)) * R
        )
        number += 1
    assert sorted(p.document for p in read) == list(range(len(reference))) and number > 20
    with pytest.raises(UserError, match="documents of more than data.raw_tokens = 20"):
        builders[0].source.along([Stretch(0, 20, 20), Stretch(20, None, R)]).check()


@pytest.mark.parametrize("most_open", [1, 4, 128])
def test_packing_fills_windows_and_overfills_none(most_open):
    lengths = np.random.default_rng(0).integers(1, 101, 3000).astype(np.int32)
    window = pack(lengths, 100, most_open)
    sums = np.bincount(window, lengths)
    assert sums.max() <= 100 and (np.bincount(window) > 0).all()
    assert len(sums) <= {1: 1.5, 4: 1.3, 128: 1.05}[most_open] * lengths.sum() / 100


@pytest.mark.parametrize("chunk_sizes", [None, (8,), (4, 2), (2, 2, 2)])
def test_micro_batches_learn_answers_only(shard, tokenizer, reference, chunk_sizes):
    gist = GistConfig(chunk_sizes, recall="suffix") if chunk_sizes else None
    data = source(tokenizer, shard)
    batch = BatchBuilder(data, gist, tokenizer).build([3, 4])
    for row, sample in enumerate([3, 4]):
        layout = batch.layout
        for number, piece in enumerate(data.segments(sample)):
            ids, context, ranges = reference[piece.document]
            raw = ((layout.doc[row] == number) & (layout.level[row] == -1)).nonzero()[:, 0]
            assert batch.ids[row][raw].tolist() == ids
            want = [IGNORED] * len(ids)
            for begin, end in ranges:
                want[begin - 1 : end - 1] = ids[begin:end]
            assert batch.labels[row][raw].tolist() == want
            if gist is None:
                assert batch.recall is None
                continue
            recalling = torch.zeros(batch.ids.numel(), dtype=torch.bool)
            recalling[batch.recall.tree.tokens] = True
            recalling = recalling.view_as(batch.ids)[row]
            assert recalling[raw].tolist() == [i >= context for i in range(len(ids))]
            gists = ((layout.doc[row] == number) & (layout.level[row] >= 0)).nonzero()[:, 0]
            assert not recalling[gists].any() and gists.max() < raw[context]
            assert layout.level[row][raw[context] - 1] == gist.levels - 1, "the context is closed at every level"
        assert (batch.labels[row][layout.level[row] >= 0] == IGNORED).all()


def test_loss_tokens_do_not_depend_on_chunk_sizes(shard, tokenizer):
    data = source(tokenizer, shard)
    counts = [
        int((BatchBuilder(data, gist, tokenizer).build([5]).labels != IGNORED).sum())
        for gist in (None, GistConfig((8,)), GistConfig((2, 2, 2)), GistConfig((4, 2), recall="all"))
    ]
    assert len(set(counts)) == 1 and counts[0] > 0


@pytest.mark.parametrize("chunk_sizes", [(1,), (1, 1), (2, 2, 2), (3,)])
def test_every_sample_fits_the_fixed_length(shard, tokenizer, chunk_sizes):
    """Short chunks and closed contexts give the most gists."""
    data = source(tokenizer, shard)
    builder = BatchBuilder(data, GistConfig(chunk_sizes, sink=0), load_tokenizer(tokenizer.directory, 3))
    longest = max(int((builder.build([s]).layout.doc[0] >= 0).sum()) for s in range(data.samples_per_epoch))
    assert longest <= builder.length


def test_plain_text_in_a_blend_has_no_suffix(tiny, shard, tokenizer):
    data = source(tokenizer, f"{shard} weight=0.5", f"{tiny.train} weight=0.5")
    builder = BatchBuilder(data, GistConfig((4, 2), recall="suffix"), tokenizer)
    plain = next(s for s in range(4) if data.spans(data.segments(s)) == [None] * len(data.segments(s)))
    other = next(s for s in range(4) if s != plain and data.spans(data.segments(s))[0] is not None)
    alone = BatchBuilder(source(tokenizer, tiny.train), GistConfig((4, 2)), tokenizer)
    batch = builder.build([plain])
    assert batch.recall is None
    pieces = data.segments(plain)
    assert int((batch.labels != IGNORED).sum()) == R - len(pieces) and alone.length < builder.length
    both = builder.build([plain, other])
    assert both.recall.tree.splits[1] == 0 < both.recall.tree.splits[2]


def copy(shard, to):
    for suffix in (".bin", ".idx", ".json", ".spans"):
        shutil.copy(f"{shard}{suffix}", f"{to}{suffix}")
    return to


def test_other_answers_are_other_data(shard, tokenizer, tmp_path):
    """A checkpoint must not resume on the same tokens with other spans."""
    prefix = copy(shard, tmp_path / "s")
    assert source(tokenizer, prefix).fingerprint == source(tokenizer, shard).fingerprint
    sidecar = json.loads((tmp_path / "s.json").read_text())
    sidecar["files"]["spans"]["sha256"] = "0" * 64
    (tmp_path / "s.json").write_text(json.dumps(sidecar))
    assert source(tokenizer, prefix).fingerprint != source(tokenizer, shard).fingerprint


def test_remote_shards_bring_their_spans(shard, tokenizer, tmp_path):
    prefix = copy(shard, tmp_path / "s")
    url = f"file://{prefix}"
    (remote,) = open_shards([url], tokenizer, "data.train", tmp_path / "cache")
    (local,) = open_shards([str(prefix)], tokenizer, "data.train")
    for document in (0, 7, 149):
        (a, b), (c, d) = remote.spans(document), local.spans(document)
        assert a == c and np.array_equal(b, d)


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda p: p.unlink(), r"s.spans does not exist"),
        (lambda p: p.write_bytes(p.read_bytes()[:-8]), r"s.spans has \d+ bytes, \d+ were written"),
        (lambda p: p.write_bytes(b"x" + p.read_bytes()[1:]), r"s.spans does not belong to the shard beside it"),
    ],
)
def test_damaged_spans_are_named(shard, tokenizer, tmp_path, damage, message):
    prefix = copy(shard, tmp_path / "s")
    damage(tmp_path / "s.spans")
    with pytest.raises(UserError, match="data.train: .*" + message):
        source(tokenizer, prefix)


def test_sources_that_cannot_be(tiny, shard, tokenizer):
    with pytest.raises(UserError, match="is supervised, .* is not; give each kind an entry with a weight"):
        source(tokenizer, shard, tiny.train)
    with pytest.raises(UserError, match=r"s has \d+ documents of more than data.raw_tokens = 100 tokens \(the longest \d+\)"):
        source(tokenizer, shard, raw_tokens=100)


def test_the_report_shows_a_sample_with_its_suffix(tiny, shard, tokenizer, tmp_path):
    config = tiny.config(tmp_path / "c.yaml", data={"train": [str(shard)], "raw_tokens": R}, gist={"recall": "suffix"})
    sample = read_sample(load_config(config))
    assert "first training sample" in sample.origin
    batch = BatchBuilder(source(tokenizer, shard, seed=1234), GistConfig((4, 2), recall="suffix"), tokenizer).build([0])
    assert sample.level.tolist() == batch.layout.level[0, : len(sample.level)].tolist()
