"""Global sample number -> packed raw tokens -> micro-batches.

The order of samples is a pure function of (seed, number) (`unfold.pretrain.data.packing`). The state of the data is therefore one
integer, and ranks, micro-batches and chunk sizes do not change what is seen. Where sources have weights, each is a stream of
windows of its own, and `unfold.pretrain.data.blend` tells which one gives a sample.

A supervised document is a context and a suffix: the context is closed, the suffix gets no gists, and only answers are
predicted. Every other document is all text, and every token of it but the first is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from unfold.data_prep.format.lazy import LazyShard
from unfold.model.config import GistConfig
from unfold.model.gist import Recall, build_layout, interleave, max_interleaved_length
from unfold.model.visibility import IGNORED, MicroBatch
from unfold.pretrain.data.blend import make_blend, parse_entry
from unfold.pretrain.data.flags import plain_flags, sample_flags
from unfold.pretrain.data.packing import CutWindows, PackedWindows, Segment
from unfold.pretrain.data.shards import open_shards
from unfold.pretrain.data.tokenizer import RunTokenizer
from unfold.pretrain.errors import UserError


class TokenSource:
    """Documents of shards as windows of raw tokens, in a reproducible order, from one source or a blend of several.

    Raises:
        UserError: a shard is missing, cut short, of another tokenizer, or holds ids outside the vocabulary; weights that
            cannot be; a source with less than one sample, with both supervised and other shards, or with supervised
            documents that do not fit into a sample.
    """

    def __init__(
        self,
        entries: Sequence[str],
        raw_tokens: int,
        seed: int,
        tokenizer: RunTokenizer,
        setting: str,
        cache: str | Path = "",
    ):
        """Open the shards.

        Args:
            entries: prefixes, globs of prefixes or URLs, each with an optional weight (`blend.parse_entry`).
            setting: the configuration key that named them, for messages.
            cache: directory for remote shards.
        """
        self.raw_tokens = raw_tokens
        parsed = [parse_entry(entry, setting) for entry in entries]
        self._blend = make_blend(parsed, setting)
        groups = [[entry.pattern for entry in parsed]] if self._blend is None else [[entry.pattern] for entry in parsed]
        self._shards: list[LazyShard] = []
        self._streams: list[CutWindows | PackedWindows] = []
        for number, patterns in enumerate(groups):
            shards = open_shards(patterns, tokenizer, setting, cache)
            first = sum(len(shard.lengths) for shard in self._shards)
            self._shards += shards
            # One source alone is drawn by the seed itself; further ones must not share its draws.
            key = [seed, 0] if self._blend is None else [seed, number + 1]
            self._streams.append(_windows(shards, first, raw_tokens, key, setting, ", ".join(patterns)))
        self._shard_first = np.cumsum([0] + [len(shard.lengths) for shard in self._shards])
        self.tokens = sum(stream.tokens for stream in self._streams)
        self.samples_per_epoch = sum(stream.samples_per_epoch for stream in self._streams)
        self.closed = max(stream.closed for stream in self._streams)  # contexts that a sample closes at most
        self.supervised = any(shard.info.supervised for shard in self._shards)

    @property
    def fingerprint(self) -> list[str]:
        """What decides the samples: the hash of each source's tokens and, in a blend, its weights."""
        return [stream.fingerprint for stream in self._streams] + ([] if self._blend is None else [repr(self._blend)])

    def fingerprint_until(self, samples: int) -> list[str]:
        """What decided the first ``samples`` samples: a source or a change of weights that comes later is not in it."""
        if self._blend is None:
            return self.fingerprint
        counters = self._blend.counters(samples)
        given = [f"{s.fingerprint} {n}" for s, n in zip(self._streams, counters) if n]
        return [*given, self._blend.history(samples)]

    def counters(self, samples: int) -> list[int]:
        """How many of the first ``samples`` samples came from each source."""
        return [samples] if self._blend is None else self._blend.counters(samples)

    def segments(self, sample: int) -> list[Segment]:
        """The pieces of documents that make up a global sample number; they sum to ``raw_tokens``, or less if supervised."""
        source, number = (0, sample) if self._blend is None else self._blend.locate(sample)
        return self._streams[source].segments(number)

    def read(self, pieces: Sequence[Segment]) -> np.ndarray:
        """int64 [sum of lengths]; a copy, since views must not outlive the mapped file."""
        out = np.empty(sum(piece.length for piece in pieces), np.int64)
        at = 0
        for piece, (shard, document) in zip(pieces, self._located(pieces)):
            shard.read(document, piece.offset, out[at : at + piece.length])
            at += piece.length
        return out

    def spans(self, pieces: Sequence[Segment]) -> list[tuple[int, np.ndarray] | None]:
        """Of each piece the tokens of its context, and its answers' tokens [begin, end), int32 [ranges, 2].

        None for a piece of a document that is all text.
        """
        return [shard.spans(document) for shard, document in self._located(pieces)]

    def _located(self, pieces: Sequence[Segment]) -> list[tuple[LazyShard, int]]:
        """The shard of each piece, and the document's number within it."""
        shards = np.searchsorted(self._shard_first, [piece.document for piece in pieces], side="right") - 1
        return [(self._shards[s], p.document - int(self._shard_first[s])) for p, s in zip(pieces, shards.tolist())]


def _windows(
    shards: list[LazyShard], first_document: int, raw_tokens: int, key: list[int], setting: str, name: str
) -> CutWindows | PackedWindows:
    """The samples of one source, by the kind of its shards."""
    supervised = [shard for shard in shards if shard.info.supervised]
    if not supervised:
        return CutWindows(shards, first_document, raw_tokens, key, f"{setting}: {name}")
    if len(supervised) < len(shards):
        plain = next(shard for shard in shards if not shard.info.supervised)
        raise UserError(
            f"{setting}: {supervised[0].prefix} is supervised, {plain.prefix} is not; give each kind an entry with a weight "
            "(`PREFIX weight=0.5`), so that each is a source of its own"
        )
    return PackedWindows(shards, first_document, raw_tokens, key, setting)


def _targets(raw: np.ndarray, lengths: Sequence[int], spans: Sequence[tuple[int, np.ndarray] | None]) -> np.ndarray:
    """int64 [R], what each raw token is to predict: of supervised documents answers only; a document's last token nothing."""
    targets = np.append(raw[1:], IGNORED)
    start = 0
    for length, own in zip(lengths, spans):
        if own is not None:
            mine = targets[start : start + length]
            learned = np.zeros(length, bool)
            for begin, end in own[1].tolist():
                learned[begin - 1 : end - 1] = True
            mine[~learned] = IGNORED
        start += length
    targets[np.cumsum(lengths) - 1] = IGNORED
    return targets


class BatchBuilder:
    """Turns global sample numbers into micro-batches of one fixed shape."""

    def __init__(
        self, source: TokenSource, gist: GistConfig | None, tokenizer: RunTokenizer, length_multiple: int = 1, seed: int = 0
    ):
        """gist: None for dense attention (no gists). length_multiple: the padded length is a multiple of it. seed: of what
        training draws for every sample."""
        self.source, self.tokenizer, self.gist, self.seed = source, tokenizer, gist, seed
        longest = source.raw_tokens
        if gist is not None:
            longest = max_interleaved_length(longest, gist.chunk_sizes, source.closed)
        self.length = -(-longest // length_multiple) * length_multiple

    def build(self, samples: Sequence[int], stage: GistConfig | None = None) -> MicroBatch:
        """The micro-batch of these global sample numbers, on CPU: ids, labels and layout [len(samples), length].

        stage: how a stage of training recalls; None for recall as the settings have it, without what training draws.
        """
        shape = (len(samples), self.length)
        ids = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        level, doc = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        flags = np.zeros(shape, np.int32)
        for row, sample in enumerate(samples):
            pieces = self.source.segments(sample)
            raw, spans = self.source.read(pieces), self.source.spans(pieces)
            lengths = [piece.length for piece in pieces]
            targets = _targets(raw, lengths, spans)
            if self.gist is None:
                used = len(raw)
                ids[row, :used], doc[row, :used] = raw, np.repeat(np.arange(len(lengths)), lengths)
                labels[row, :used] = targets
                continue
            contexts = np.array([-1 if own is None else own[0] for own in spans])
            gist_ids = self.tokenizer.gist_ids[: self.gist.levels]
            made = interleave(raw, lengths, self.tokenizer.word_starts, self.gist, gist_ids, contexts=contexts)
            used = len(made.ids)
            ids[row, :used], level[row, :used], doc[row, :used] = made.ids, made.level, made.doc
            labels[row, :used][made.level < 0] = targets
            context = contexts[made.doc]
            suffix = (made.level < 0) & (context >= 0) & (made.position >= context)
            flags[row, :used] = (
                plain_flags(made, suffix, self.gist) if stage is None else sample_flags(made, suffix, stage, self.seed, sample)
            )
        return self._micro_batch(ids, labels, level, doc, flags, stage or self.gist)

    def empty(self) -> MicroBatch:
        """One sample of padding without any target, for a rank that has nothing to do but must take part."""
        shape = (1, self.length)
        nowhere = np.full(shape, -1, np.int32)
        labels, flags = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.int32)
        return self._micro_batch(np.zeros(shape, np.int64), labels, nowhere, nowhere, flags, self.gist)

    def _micro_batch(
        self,
        ids: np.ndarray,
        labels: np.ndarray,
        level: np.ndarray,
        doc: np.ndarray,
        flags: np.ndarray,
        gist: GistConfig | None,
    ) -> MicroBatch:
        """flags: of every token, see `unfold.pretrain.data.flags`; gist: how those recall that do."""
        layout = build_layout(torch.from_numpy(level), torch.from_numpy(doc), self.gist)
        recall = Recall.from_flags(layout, gist, torch.from_numpy(flags)) if flags.any() else None
        return MicroBatch(torch.from_numpy(ids), torch.from_numpy(labels), layout, recall)


def step_samples(step: int, global_batch: int, micro_batch: int, data_rank: int, data_size: int) -> list[list[int]]:
    """Global sample numbers of this rank's micro-batches in a step (counted from 0).

    Every layout sees the samples ``step * global_batch .. + global_batch`` in that step.
    """
    first = step * global_batch
    per_rank = global_batch // data_size
    mine = range(first + data_rank * per_rank, first + (data_rank + 1) * per_rank)
    return [list(mine[i : i + micro_batch]) for i in range(0, per_rank, micro_batch)]
