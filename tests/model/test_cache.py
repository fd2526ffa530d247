"""The cache's parts: growing arrays, the outline of a growing document, what a step reads."""

import copy
import math

import numpy as np
import pytest
import torch

from tests.benchmarks import decode_cpu
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode.cache import CachedOutline, Reads, Rows, SequenceCache
from unfold.model.decode.prefill import short_sample, whole_tree
from unfold.model.gist import build_layout, build_recall, interleave
from unfold.model.gist.growable import Growable
from unfold.model.gist.growing import GistPlacement, Outline


def test_growable():
    grown, parts, allocations = Growable([2, 0, 3], 1, torch.float32, "cpu"), [], set()
    for _ in range(1000):
        parts.append(torch.randn(2, 1, 3))
        grown.append(parts[-1])
        allocations.add(grown.memory.data_ptr())
    assert torch.equal(grown.rows, torch.cat(parts, 1))
    assert len(allocations) <= math.log2(1000) and grown.memory.shape[1] < 2048
    grown.truncate(7)
    grown.append(parts[0])
    assert torch.equal(grown.rows, torch.cat(parts[:7] + parts[:1], 1))


def test_memory_that_a_gpu_reads_in_place_is_given_up_when_it_has_read(monkeypatch):
    """Its kernels may still write the rows, too: they are copied afterwards."""
    gpu, empty, waited = torch.device("cuda", 1), torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **how: empty(*shape, **how))
    grown = Growable([0, 2], 0, torch.float32, "cpu", gpu)

    def wait(device):
        waited.append(device)
        grown.rows.fill_(len(waited))  # a kernel that was launched before

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    grown.append(torch.zeros(16, 2))
    grown.append(torch.zeros(1, 2))
    assert waited == [gpu, gpu] and grown.moves == 2
    assert bool((grown.rows[:16] == 2).all()) and not grown.rows[16].any()
    branch = grown.copy()
    assert waited == [gpu] * 3 and torch.equal(branch.rows[16], torch.full((2,), 3.0))


def test_addresses_are_those_of_the_memory_whatever_moved():
    """Of appended rows, of a branch, and of what did not move."""
    config = ModelConfig(60, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=48)
    cache = SequenceCache(config, CachedOutline(GistConfig((4, 2))), torch.float32, torch.device("cpu"))
    found = lambda cache: [[[r.memory.data_ptr(), r.memory.shape[2]] for r in layer] for layer in cache.layers]
    for layer, segment, count in [(0, 2, 3), (0, 2, 1), (1, 0, 20), (1, 2, 40), (0, 2, 30)]:
        cache.layers[layer][segment].append(*torch.zeros(2, count, 2, 8))
        assert cache.addresses().tolist() == found(cache)
    branch = copy.deepcopy(cache)
    branch.layers[0][2].append(*torch.zeros(2, 99, 2, 8))
    assert branch.addresses().tolist() == found(branch) != found(cache) == cache.addresses().tolist()


def test_rows_count_every_read():
    reads = Reads()
    rows = Rows(2, 4, torch.float32, torch.device("cpu"), reads)
    k, v = torch.randn(2, 30, 2, 4)
    rows.append(k[:20], v[:20])
    rows.append(k[20:], v[20:])
    assert torch.equal(rows.keys(3, 9), k[3:9].transpose(0, 1)) and torch.equal(rows.values(0, 1), v[:1].transpose(0, 1))
    at = torch.tensor([[1, 29, 1], [0, 5, 7]])
    assert torch.equal(rows.keys_at(at)[1], k[[0, 5, 7], 1]) and torch.equal(rows.values_at(at)[0], v[[1, 29, 1], 0])
    assert (reads.keys, reads.values) == (2 * 6 + 6, 2 * 1 + 6)


def document(config: GistConfig, raw: int, suffix: int) -> torch.Tensor:
    """Levels of a closed context and a suffix, [T]."""
    starts = np.random.default_rng(raw).random(50) < 0.3
    ids = np.random.default_rng(1).integers(0, 50, raw)
    level = interleave(ids, [raw], starts, config, range(50, 50 + config.levels), close=True).level
    return torch.from_numpy(np.append(level, np.full(suffix, -1))).long()


CONFIGS = [GistConfig((4,)), GistConfig((3, 2)), GistConfig((2, 2, 2), sink=0, n_prev=0), GistConfig((5, 3, 2), sink=9, n_prev=2)]
CONFIGS += [GistConfig((5,), n_prev=2, own_group=True), GistConfig((4, 3, 2), own_group=True)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.chunk_sizes}{c.own_group}")
@pytest.mark.parametrize("raw,suffix", [(83, 12), (7, 4), (1, 1), (0, 6), (40, 0)])
def test_outline_is_the_layout_of_the_whole(config, raw, suffix):
    level = document(config, raw, suffix)
    layout = build_layout(level[None], torch.zeros_like(level)[None], config)
    intervals, segments = layout.intervals, config.levels + 1
    recalls = level < 0
    expected = build_recall(layout, config, recalls[None])
    for seed in range(3):
        outline, sights = Outline(config), []
        for part in torch.tensor_split(level, sorted(np.random.default_rng(seed).integers(0, len(level) + 1, 4).tolist())):
            if len(part):
                sights.append(outline.append(part))
        join = lambda name: torch.cat([getattr(s, name) for s in sights], -1)  # noqa: B023
        start = intervals.segment_start[0, :segments, None]
        lo, hi = (x[0, :segments] - start for x in (intervals.lo, intervals.hi))
        assert torch.equal(join("hi"), hi.long())
        assert torch.equal(join("lo"), lo.long())
        assert torch.equal(join("sinks"), (intervals.hi - intervals.lo)[0, -1].long())
        assert torch.equal(join("position"), layout.position[0])
        # The tree needs the sight of its queries alone.
        whole = Outline(config)
        tree = whole_tree(whole, whole.append(level).at(recalls))
        for name in ("child_lo", "child_hi", "parent", "tail", "span"):
            assert torch.equal(getattr(tree, name).long(), getattr(expected, name).long()), name
        assert torch.equal(tree.lo[:-1], expected.lo[:-1]) and torch.equal(tree.hi[:-1], expected.hi[:-1])
        assert torch.equal((tree.hi - tree.lo)[-1], (expected.hi - expected.lo)[-1])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.chunk_sizes}{c.own_group}")
def test_short_sample_shows_what_the_layout_shows(config):
    level = document(config, 83, 5)
    layout = build_layout(level[None], torch.zeros_like(level)[None], config)
    mask = layout.intervals.dense_mask()[0]
    for begin, end in ((0, 9), (50, 51), (60, len(level)), (len(level) - 1, len(level))):
        outline = Outline(config)
        if begin:
            outline.append(level[:begin])
        spans, own, intervals = short_sample(outline.append(level[begin:end]))
        token_of = [(level == config.levels - 1 - s).nonzero()[:, 0][a:b] for s, a, b in spans]
        token_of = torch.cat(token_of)  # which token each place of the short sample holds
        assert token_of[own].tolist() == list(range(begin, end))
        seen = torch.zeros(end - begin, len(level), dtype=torch.bool)
        for i, row in enumerate(intervals.dense_mask()[0][own]):
            seen[i, token_of[row]] = True
        assert torch.equal(seen, mask[begin:end])


@pytest.mark.parametrize("close", [False, True])
def test_placement_token_by_token_is_insertion(close):
    """Read at once or in any pieces; what is taken off again is put back."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        config = GistConfig(tuple(rng.integers(1, 7, rng.integers(1, 4)).tolist()), sink=int(rng.integers(0, 5)))
        gists, starts = range(50, 50 + config.levels), rng.random(50) < rng.choice([0.0, 0.2, 0.8])
        raw = rng.integers(0, 50, rng.integers(0, 120))
        placement, ids, level = GistPlacement(config, starts, gists), [], []
        pieces = np.split(raw, np.sort(rng.integers(0, len(raw) + 1, 20)))
        for number, piece in enumerate(pieces):
            feed = placement.push(piece.tolist(), close=close and number == len(pieces) - 1)
            kept = len(ids) - feed.drop
            assert all(l < 0 for l in level[kept:])
            ids, level = ids[:kept] + feed.ids, level[:kept] + feed.level
        whole = interleave(raw, [len(raw)], starts, config, gists, close=close)
        same = len(whole.ids) if close else len(ids) - len(placement.chunk)
        assert ids[:same] == whole.ids[:same].tolist() and level[:same] == whole.level[:same].tolist()
        assert not close or len(ids) == same
        assert len(placement.chunk) <= config.sink + config.chunk_sizes[0] * 3 // 2


@pytest.mark.parametrize("close", [False, True])
def test_placement_that_is_not_word_aware_never_waits(close):
    """After every piece the gists stand where insertion puts those of what was read so far; nothing is taken off again."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        sizes = tuple(rng.integers(1, 7, rng.integers(1, 4)).tolist())
        config = GistConfig(sizes, sink=int(rng.integers(0, 5)), word_aware=False)
        gists = range(50, 50 + config.levels)
        raw = rng.integers(0, 50, rng.integers(0, 120))
        placement, ids, level, read = GistPlacement(config, None, gists), [], [], 0
        pieces = np.split(raw, np.sort(rng.integers(0, len(raw) + 1, 40)))
        for number, piece in enumerate(pieces):
            closes, certain = close and number == len(pieces) - 1, placement.certain
            feed = placement.push(piece.tolist(), close=closes)
            assert not feed.drop
            ids, level, read = ids + feed.ids, level + feed.level, read + len(piece)
            whole = interleave(raw[:read], [read], None, config, gists, close=closes)
            assert ids == whole.ids.tolist() and level == whole.level.tolist()
            assert len(piece) != 1 or closes or certain == (feed.level == [-1])
    with pytest.raises(ValueError, match="word_starts: None, but chunks grow"):
        GistPlacement(GistConfig((4,)), None, [50])


def test_keys_read_grow_like_the_logarithm(build):
    """Counted by the cache for c = (8, 8, 8, 8) and a fixed k; a scan of all level-0 gists would read an eighth of T."""
    decoder = decode_cpu.decoder(build, GistConfig(decode_cpu.SIZES, recall="suffix", topk=4), layers=2, head_dim=2)
    tops, counts = [], []
    for raw in (4**n for n in range(5, 11)):  # 1k .. 1M
        sequence = decode_cpu.filled(decoder, raw)
        counts.append(decode_cpu.keys_read(decoder, sequence, layer=1))
        tops.append(sequence.cache.outline.counts[0])
    below = np.array(counts) - tops  # the top level is scanned: T / 4096 gists, 226 of them at 1M
    # At most 4 heads * 4 parents with 8 children each and an open group on three levels, 16 chunks, the windows.
    assert max(below) <= 3 * (16 * 8 + 8) + 16 * 12 + 2 * 12 + 3
    assert max(below) < 3 * below[0], "a factor of 1024 in length"
    assert counts[-1] < 4**10 / 1000 and counts[0] > 4 * 8, "it does unfold"


def test_a_dense_step_reads_everything(build):
    decoder = decode_cpu.decoder(build, None, layers=2, head_dim=8)
    assert decode_cpu.keys_read(decoder, decode_cpu.filled(decoder, 1000), layer=1) == 1001


def test_the_first_layer_reads_windows_and_top_gists_only(build):
    decoder = decode_cpu.decoder(build, GistConfig((8, 8), recall="suffix", topk=4), layers=2, head_dim=8)
    sequence = decode_cpu.filled(decoder, 4096)
    top = sequence.cache.outline.counts[0]
    assert top <= decode_cpu.keys_read(decoder, sequence, layer=0) <= top + 2 * 8 + 2 * 12 + 3 + 1
