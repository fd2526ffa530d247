"""Whole documents packed by best fit, and documents read more often by their length."""

from collections import Counter

import numpy as np
import pytest

from tests.integration.runs import train
from unfold.data_prep.format.shards import write_shard
from unfold.pretrain.config import parse_config
from unfold.pretrain.config.numbers import whole_weights
from unfold.pretrain.data import windows
from unfold.pretrain.data.blend import Arranged
from unfold.pretrain.data.packing import cut
from unfold.pretrain.data.samples import TokenSource
from unfold.pretrain.data.stretches import stretches_of
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.data.windows import repeated
from unfold.pretrain.errors import UserError

R = 128
LENGTHS = [int(n) for n in np.random.Generator(np.random.Philox(key=5)).integers(2, 100, 300)] + [128, 129, 700, 256, 1000]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny.tokenizer, 2)


@pytest.fixture(scope="module")
def shard(tiny, tokenizer, tmp_path_factory):
    """Documents of many lengths, some longer than a sample."""
    from unfold.data_prep.tokenization.load import load_tokenizer as load_full

    prefix = tmp_path_factory.mktemp("packed") / "s"
    ids = np.random.Generator(np.random.Philox(key=6)).integers(10, 500, sum(LENGTHS)).astype(np.uint16)
    write_shard(prefix, np.split(ids, np.cumsum(LENGTHS)[:-1]), tokenizer=load_full(tiny.tokenizer).info)
    return prefix


def open_source(shard, tokenizer, raw_tokens=R, packing="best_fit", weights=(), seed=1):
    return TokenSource([str(shard)], raw_tokens, seed, tokenizer, "data.train", "", Arranged(packing, weights))


def tokens_of(source, numbers):
    return Counter((p.document, t) for n in numbers for p in source.segments(n) for t in range(p.offset, p.offset + p.length))


def test_an_epoch_has_every_token_once_and_cuts_only_what_is_too_long(shard, tokenizer):
    source = open_source(shard, tokenizer)
    epoch = source.samples_per_epoch
    for first in (0, 3 * epoch):
        seen = tokens_of(source, range(first, first + epoch))
        assert len(seen) == sum(LENGTHS) and set(seen.values()) == {1}
    for number in range(epoch):
        pieces = source.segments(number)
        assert 0 < sum(p.length for p in pieces) <= R
        for piece in pieces:
            length = LENGTHS[piece.document]
            assert piece.length == (length if length <= R else min(R, length - piece.offset)) and piece.offset % R == 0
    documents, samples, padding, cut_share = source.shares()
    assert (documents, samples) == (len(LENGTHS), epoch)
    assert padding == 1 - sum(LENGTHS) / (epoch * R) and padding < 0.04
    assert cut_share == sum(n > R for n in LENGTHS) / len(LENGTHS)


def test_samples_are_a_function_of_seed_and_number(shard, tokenizer):
    one, again = open_source(shard, tokenizer), open_source(shard, tokenizer)
    late = 7 * one.samples_per_epoch + 5
    assert [again.segments(n) for n in (late, 3)] == [one.segments(n) for n in (late, 3)]
    assert any(open_source(shard, tokenizer, seed=2).segments(n) != one.segments(n) for n in range(5))


def test_share_of_documents_that_windows_cut(shard, tokenizer, monkeypatch):
    for groups in (1 << 20, 40):  # each by itself, and in runs
        monkeypatch.setattr(windows, "GROUPS", groups)
        source = open_source(shard, tokenizer, packing="windows")
        pieces = Counter(p.document for n in range(source.samples_per_epoch) for p in source.segments(n))
        read = tokens_of(source, range(source.samples_per_epoch))
        partly = {d for d, n in enumerate(LENGTHS) if 0 < sum((d, t) in read for t in range(n)) < n}  # at the epoch's end
        several = {d for d, n in pieces.items() if n > 1} | partly
        documents, _, padding, share = source.shares()
        assert padding == 0 and share == len(several) / documents > 0.3


def test_pieces_are_cut_into_whole_samples():
    pieces = tuple(np.array(x) for x in ([4, 9, 9], [0, 10, 90], [5, 25, 3]))
    found = [x.tolist() for x in cut(pieces, 10)]
    assert found == [[4, 9, 9, 9, 9], [0, 10, 20, 30, 90], [5, 10, 10, 5, 3]]


@pytest.mark.parametrize("packing", ["windows", "best_fit"])
def test_long_documents_are_read_more_often(shard, tokenizer, packing):
    weights = ((50, 1.5), (100, 3))
    source = open_source(shard, tokenizer, packing=packing, weights=weights)
    times = lambda n: 2 if n < 50 else 3 if n < 100 else 6
    seen = tokens_of(source, range(source.samples_per_epoch))
    for document, length in enumerate(LENGTHS):
        counts = {seen[document, token] for token in range(length)}
        assert max(counts) <= times(length) and (packing == "windows" or counts == {times(length)})
    assert source.tokens == sum(n * times(n) for n in LENGTHS)
    assert sum(seen.values()) > source.tokens - R
    assert open_source(shard, tokenizer, packing=packing, weights=((0, 7.0),)).segments(9) == open_source(
        shard, tokenizer, packing=packing
    ).segments(9), "one weight for all is none"


def test_equal_entries_are_far_from_one_another():
    assert repeated(np.array([5, 50, 5, 60]), ((40, 3.0),)).tolist() == [0, 1, 2, 3, 1, 3, 1, 3]


@pytest.mark.parametrize(
    "weights,times", [(((8, 2),), [1, 2]), (((8, 1.5), (9, 0.5)), [2, 3, 1]), (((0, 2), (9, 4)), None), (((3, 64.0),), [1, 64])]
)
def test_weights_become_whole_numbers(weights, times):
    found = whole_weights(weights)
    assert found == times or times is None and found[1:] == [1, 2]


@pytest.mark.parametrize(
    "weights,said",
    [
        ([[8, 65]], r"data.length_weights: \[65.0\] are no whole numbers up to 64 in proportion"),
        ([[8, 0]], "are not weights above 0 by rising tokens"),
        ([[9, 2], [8, 3]], "are not weights above 0 by rising tokens"),
        ([[9]], "data.length_weights.0"),
        ([[9, float("inf")]], "data.length_weights: inf is not a finite number"),
        ([[9, True]], "data.length_weights: true is no number"),
        ([[8, 0.01]], r"data.length_weights: \[0.01\] are no whole numbers up to 64 in proportion"),  # not 1/64
        ([[0, 0.001]], r"data.length_weights: \[0.001\] are no whole numbers up to 64 in proportion"),
    ],
)
def test_weights_that_cannot_be(weights, said):
    with pytest.raises(UserError, match=said):
        parse_config({"data": {"train": ["x"], "tokenizer": "t", "length_weights": weights}})


def test_what_a_stage_left_is_packed_anew(shard, tokenizer):
    stages = [{"until": 10, "raw_tokens": 64}, {"until": 20, "raw_tokens": 300}]
    data = {"train": [str(shard)], "tokenizer": "t", "raw_tokens": R, "packing": "best_fit"}
    config = parse_config({"data": data, "train": {"steps": 900, "global_batch": 4, "stages": stages}})
    source = open_source(shard, tokenizer).along(stretches_of(config))
    seen, number = Counter(), 0
    while len(seen) < sum(LENGTHS):
        pieces = source.segments(number)
        assert sum(p.length for p in pieces) <= (64 if number < 40 else 300 if number < 80 else R)
        seen.update(tokens_of(source, [number]))
        number += 1
    assert set(seen.values()) == {1}, "the first epoch has each token once, whatever the lengths"
    assert number > 80 and source.segments(number)
    joined = [p for n in range(40, 80) for p in source.segments(n) if p.length > 64]
    assert joined, "pieces that the first stage would have cut are whole again"


@pytest.fixture(scope="module")
def config(tiny, shard, tmp_path_factory):
    data = {"train": [str(shard)], "valid": [], "packing": "best_fit", "length_weights": [[64, 2]]}
    train = {"steps": 6, "global_batch": 4, "stages": [{"until": 3, "raw_tokens": 64}]}
    return tiny.config(tmp_path_factory.mktemp("run") / "c.yaml", data=data, train=train, checkpoint={"every": 3})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.parametrize("name", ["parallel.context=2", pytest.param("parallel.zero=2", marks=pytest.mark.long)])
def test_layouts_give_the_losses_of_one_process(name, config, alone, tmp_path):
    found = train(config, tmp_path / "run", 2, name)
    for got, want in zip(found, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"] and got["loss_tokens"] == want["loss_tokens"]
    log = (tmp_path / "run").with_suffix(".log").read_text()
    assert log.count("of the documents cut") == 2 and "(best_fit)" in log
