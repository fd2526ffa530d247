"""Linked shards in training: bundles packed whole, links in place, answers learned, parts shuffled, what cannot be."""

import numpy as np
import pytest
import torch

from tests.supervised import add_links, make_linked_shard, make_shard
from unfold.kernels.compressed import compressed_attention
from unfold.model.gist import GistConfig, Role, build_layout, raw_layout
from unfold.model.visibility import IGNORED, MicroBatchAttention
from unfold.pretrain.config import load_config
from unfold.pretrain.data.samples import BatchBuilder, TokenSource
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.report.sample import read_sample
from unfold.pretrain.train.inputs import open_inputs

R = 256
GIST = GistConfig((4, 2), recall="suffix", links=2)


@pytest.fixture(scope="module")
def root(tiny, tmp_path_factory):
    """A tokenizer with 3 link ids, and a linked shard made with it."""
    root = tmp_path_factory.mktemp("linked")
    make_linked_shard(add_links(tiny, root / "tokenizer"), root / "s")
    return root


@pytest.fixture(scope="module")
def tokenizer(root):
    return load_tokenizer(root / "tokenizer", 2)


@pytest.fixture(scope="module")
def reference(root):
    """What data_prep says is in the shard: ids, edges and ranges of each document."""
    from unfold.data_prep.format.shards import open_shard

    opened = open_shard(root / "s")
    spans = [opened.spans[i : i + 1] for i in range(opened.info.documents)]
    return [(opened.document(i).tolist(), s.edges.tolist(), s.ranges.tolist()) for i, s in enumerate(spans)]


def source(tokenizer, *prefixes, raw_tokens=R):
    return TokenSource([str(p) for p in prefixes], raw_tokens, 1, tokenizer, "data.train")


@pytest.mark.parametrize("gist", [None, GIST, GistConfig((2, 2, 2), recall="all", links=0)])
def test_micro_batches_hold_bundles_and_learn_answers(root, tokenizer, reference, gist):
    data = source(tokenizer, root / "s")
    tokenizer = load_tokenizer(root / "tokenizer", 3)
    builder = BatchBuilder(data, gist, tokenizer)
    links = list(tokenizer.link_ids[: gist.links]) if gist else []
    for sample in range(data.samples_per_epoch):
        batch = builder.build([sample])
        layout = batch.layout
        ids, labels, role, part, doc = (x[0] for x in (batch.ids, batch.labels, layout.role, layout.part, layout.doc))
        assert (labels[layout.level[0] >= 0] == IGNORED).all() and (labels[role == Role.LINK] == IGNORED).all()
        for number, piece in enumerate(data.segments(sample)):
            own, edges, ranges = reference[piece.document]
            mine, text = doc == number, (doc == number) & layout.text[0]
            assert ids[text].tolist() == own
            want = [IGNORED] * len(own)
            for begin, end in ranges:
                want[begin - 1 : end - 1] = own[begin:end]
            assert labels[text].tolist() == want
            count = [int((mine & (layout.level[0] < 0) & (role == r)).sum()) for r in (Role.PREFIX, Role.SUFFIX)]
            assert count == [edges[0], len(own) - edges[-1]]
            sizes = [int((text & (role == Role.PART) & (part == j + 1)).sum()) for j in range(len(edges) - 1)]
            assert sizes == np.diff(edges).tolist()
            assert ids[mine & (role == Role.LINK)].tolist() == links * len(sizes)
        if gist is None:
            assert batch.recall is None
            continue
        recalling = torch.zeros(batch.ids.numel(), dtype=torch.bool)
        recalling[batch.recall.tree.tokens] = True
        assert torch.equal(recalling, layout.text[0] & ((role == Role.SUFFIX) | (gist.recall == "all")))


def test_parts_are_shuffled_by_seed_and_number(root, tokenizer, reference):
    data = source(tokenizer, root / "s")
    plain, shuffled, again = (BatchBuilder(data, GIST, tokenizer, seed=7, shuffle_parts=s) for s in (False, True, True))
    other = BatchBuilder(data, GIST, tokenizer, seed=8, shuffle_parts=True)
    epoch = data.samples_per_epoch
    assert torch.equal(again.build([epoch + 3]).ids, shuffled.build([epoch + 3]).ids), "whatever was asked before"
    orders = set()
    for sample in range(epoch):
        before, after = plain.sample(sample), shuffled.sample(sample)
        for doc in range(before.doc.max() + 1):
            of = lambda made, mask: made.ids[mask & (made.doc == doc) & (made.level < 0)].tolist()  # noqa: B023
            parts = lambda made: [of(made, made.part * (made.role == Role.PART) == j) for j in range(1, made.part.max() + 1)]  # noqa: B023
            first, second = ([p for p in parts(made) if p] for made in (before, after))
            assert sorted(first) == sorted(second)
            orders.add(tuple(first.index(p) for p in second))
            for role in (Role.PREFIX, Role.SUFFIX, Role.LINK):
                assert of(before, before.role == role) == of(after, after.role == role)
        assert np.array_equal(plain.build([sample]).labels[plain.build([sample]).labels >= 0],
                              shuffled.build([sample]).labels[shuffled.build([sample]).labels >= 0])  # fmt: skip
    assert len(orders) > 6, "parts come in many orders"
    assert any(other.sample(s).ids.tolist() != shuffled.sample(s).ids.tolist() for s in range(4))


def test_blends_keep_one_shape_and_text_is_as_it_was(tiny, root, tokenizer):
    plain = make_shard_with(root, "plain")
    data = source(tokenizer, f"{root / 's'} weight=0.5", f"{plain} weight=0.5")
    builder = BatchBuilder(data, GIST, tokenizer)
    shapes = set()
    for sample in range(6):
        batch = builder.build([sample])
        shapes.add(batch.layout.role.shape)
        if not batch.layout.role.any():
            alone = build_layout(batch.layout.level, batch.layout.doc, GIST)
            assert torch.equal(alone.intervals.dense_mask(), batch.layout.intervals.dense_mask())
    assert len(shapes) == 1
    assert builder.empty().layout.role.shape == (1, builder.length)


def make_shard_with(root, name):
    """A supervised shard that is not linked, of the same tokenizer."""

    class Data:
        tokenizer = root / "tokenizer"

    return make_shard(Data, root / name, 30)


def test_dense_attention_of_bundles_is_that_of_their_ranges(root, tokenizer):
    batch = BatchBuilder(source(tokenizer, root / "s"), None, tokenizer).build([0, 1])
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*batch.ids.shape, 2, 8, generator=g, dtype=torch.float64) for _ in range(3))
    got = MicroBatchAttention("dense", batch.layout)(0, q, k, v)
    want = compressed_attention(q, k, v, raw_layout(batch.layout, gists=False).intervals, backend="reference")
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"gist": {"links": 5}}, r"gist.links: 5, but the tokenizer .*tokenizer has 3 link ids; make it with --links 5, or"),
        ({"model": {"max_position": 60}, "data": {"raw_tokens": 60}}, "documents of more than data.raw_tokens = 60 tokens"),
        ({"model": {"max_position": 256}, "data": {"raw_tokens": 256}, "gist": {"links": 3}}, None),
    ],
)
def test_what_cannot_be_is_named(tiny, root, tmp_path, sections, message):
    data = {"train": [str(root / "s")], "valid": [], "tokenizer": str(root / "tokenizer"), "raw_tokens": R, "shuffle_parts": True}
    sections = {"gist": {"recall": "suffix", "links": 3}} | sections | {"data": data | sections.get("data", {})}
    config = load_config(tiny.config(tmp_path / "c.yaml", **sections))
    if message is None:
        assert open_inputs(config).train.source.linked
        return
    with pytest.raises(UserError, match=message):
        open_inputs(config)


def test_links_that_leave_the_positions_are_named(root, tokenizer):
    data = source(tokenizer, root / "s")
    longest = max(int((s.lengths + 3 * s.parts).max()) for s in data._shards)
    data.check_positions(3, longest, "data.train")
    message = rf"data.train: .* parts, which with gist.links = 4 are \d+ positions, more than model.max_position = {longest};"
    with pytest.raises(UserError, match=message):
        data.check_positions(4, longest, "data.train")


def test_shuffling_needs_linked_contexts(tiny, tmp_path):
    with pytest.raises(UserError, match="data.shuffle_parts: true, but no shard of data.train has linked contexts"):
        open_inputs(load_config(tiny.config(tmp_path / "c.yaml", data={"shuffle_parts": True})))


def test_the_report_shows_a_bundle(tiny, root, tmp_path):
    data = {"train": [str(root / "s")], "tokenizer": str(root / "tokenizer"), "raw_tokens": R}
    config = tiny.config(tmp_path / "c.yaml", data=data, gist={"recall": "suffix", "links": 2})
    picture = read_sample(load_config(config))
    assert "first training sample" in picture.origin
    assert picture.sink.sum() >= 2 * 3, "the sinks of every part"
    parts = np.flatnonzero(np.diff(picture.sink.astype(int)) > 0) + 1  # where sinks begin, later parts see nothing before
    assert all(picture.mask[i].sum() == 1 for i in parts)
