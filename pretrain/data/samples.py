"""Global sample number -> packed raw tokens -> micro-batches.

The order of samples is a pure function of (seed, number) (`unfold.pretrain.data.packing`). The state of the data is therefore one
integer, and ranks, micro-batches and chunk sizes do not change what is seen. Where sources have weights, each is a stream of
windows of its own, and `unfold.pretrain.data.blend` tells which one gives a sample.

A supervised document is a context and a suffix: the context is closed, the suffix gets no gists, and only answers are
predicted. Its context may be linked documents, each a part to itself. Every other document is all text, and every token of it
but the first is predicted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from unfold.data_prep.format.lazy import LazyShard
from unfold.model.config import GistConfig
from unfold.model.gist import (
    Bundle,
    Interleaved,
    Recall,
    Role,
    build_layout,
    interleave,
    max_interleaved_length,
    without_gists,
)
from unfold.model.visibility import IGNORED, MicroBatch
from unfold.pretrain.data.blend import Blend, Stretch, make_blend, parse_entry
from unfold.pretrain.data.flags import plain_flags, sample_flags
from unfold.pretrain.data.linked import bundle_of, check_links, shuffle_parts
from unfold.pretrain.data.packing import PackedWindows
from unfold.pretrain.data.shards import open_shards
from unfold.pretrain.data.tokenizer import RunTokenizer
from unfold.pretrain.data.windows import CutWindows, Leg, LengthWeights, Segment
from unfold.pretrain.errors import UserError


class TokenSource:
    """Documents of shards as windows of raw tokens, in a reproducible order, from one source or a blend of several.

    Attributes:
        raw_tokens: of a sample of the stretch that it stands at.
        tokens: of all documents.

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
        packing: str = "windows",
        length_weights: LengthWeights = (),
    ):
        """Open the shards.

        Args:
            entries: prefixes, globs of prefixes or URLs, each with an optional weight (`blend.parse_entry`).
            raw_tokens: of every sample; see :meth:`along` for others.
            setting: the configuration key that named them, for messages.
            cache: directory for remote shards.
            packing: of text, as `data.packing` names it.
            length_weights: of documents, see :func:`unfold.pretrain.data.windows.repeated`.
        """
        self._setting, self._entries = setting, [parse_entry(entry, setting) for entry in entries]
        is_blend = make_blend(self._entries, setting) is not None
        groups = [[e.pattern] for e in self._entries] if is_blend else [[e.pattern for e in self._entries]]
        self._shards: list[LazyShard] = []
        self._streams: list[CutWindows | PackedWindows] = []
        for number, patterns in enumerate(groups):
            shards = open_shards(patterns, tokenizer, setting, cache)
            first = sum(len(shard.lengths) for shard in self._shards)
            self._shards += shards
            # One source alone is drawn by the seed itself; further ones must not share its draws.
            key = [seed, number + 1] if is_blend else [seed, 0]
            kind = _kind(shards, packing, setting)
            self._streams.append(kind(shards, first, key, setting, ", ".join(patterns), length_weights))
        self._shard_first = np.cumsum([0] + [len(shard.lengths) for shard in self._shards])
        self.tokens = sum(stream.tokens for stream in self._streams)
        self.supervised = any(shard.info.supervised for shard in self._shards)
        self.linked = any(shard.linked for shard in self._shards)
        self._follow([Stretch(0, None, raw_tokens)], 0)
        self.check()

    def along(self, stretches: Sequence[Stretch], at: int = 0) -> TokenSource:
        """The same shards for a run whose samples are these stretches, the last without end; it stands at one of them."""
        other = copy.copy(self)
        other._follow(list(stretches), at)
        return other

    def _follow(self, stretches: list[Stretch], at: int) -> None:
        self._stretches, self._at = stretches, at
        self.raw_tokens = stretches[at].raw_tokens
        self._blend = make_blend(self._entries, self._setting, stretches)
        begins = np.cumsum([0] + [s.planned for s in stretches[:-1]])
        planned = [replace(s, begin=int(begin)) for s, begin in zip(stretches, begins)]
        # A leg of a source is what neighbouring stretches of one length have of it; its plan must not follow what is left out.
        firsts = [i for i, s in enumerate(stretches) if not i or s.raw_tokens != stretches[i - 1].raw_tokens]
        given = _counters(self._blend, [stretches[i].begin for i in firsts])
        wanted = _counters(make_blend(self._entries, self._setting, planned), [planned[i].begin for i in firsts])
        self._leg_of = [sum(i <= stretch for i in firsts) for stretch in range(len(stretches))]
        self._legs = []
        for begins, plans in zip(zip(*given), zip(*wanted)):
            counts = [b - a for a, b in zip(plans, plans[1:])] + [None]
            lengths = [stretches[i].raw_tokens for i in firsts]
            self._legs.append([Leg(*leg) for leg in zip(begins, lengths, counts)])

    def check(self, stretches: int = 1) -> TokenSource:
        """This source. Raises UserError where documents do not make samples of a length that the first stretches have."""
        for stream, legs in zip(self._streams, self._legs):
            for leg in legs[: self._leg_of[stretches - 1]]:
                if leg.planned != 0:
                    stream.check(leg.raw_tokens)
        return self

    def shares(self) -> tuple[int, int, float, float]:
        """Of an epoch of every source in samples of this length: documents, as often as they are read, and samples; the share of
        their tokens that is padding, and of the documents those that are cut."""
        found = [(stream.entries, stream.per_epoch(self.raw_tokens), *stream.shares(self.raw_tokens)) for stream in self._streams]
        documents, samples = sum(f[0] for f in found), sum(f[1] for f in found)
        padding = sum(f[1] * f[2] for f in found) / samples
        return documents, samples, padding, sum(f[0] * f[3] for f in found) / documents

    def _most(self) -> list[tuple[int, int]]:
        legs = self._leg_of[self._at]
        return [stream.most(own[:legs]) for stream, own in zip(self._streams, self._legs)]

    @property
    def closed(self) -> int:
        """Contexts or parts that a sample of the stretch closes at most."""
        return max(closed for closed, _ in self._most())

    @property
    def parts(self) -> int:
        """Parts of linked contexts that a sample of the stretch holds at most."""
        return max(parts for _, parts in self._most())

    @property
    def samples_per_epoch(self) -> int:
        """Of this length, from all sources."""
        return sum(stream.per_epoch(self.raw_tokens) for stream in self._streams)

    def check_positions(self, links: int, longest: int, setting: str) -> None:
        """Raise UserError where a linked context has more positions than ``longest``, its links for every part among them."""
        for shard in (shard for shard in self._shards if shard.linked):
            positions = shard.lengths + links * shard.parts
            if (most := int(positions.max())) > longest:
                document = int(positions.argmax())
                raise UserError(
                    f"{setting}: {shard.prefix} has a document of {shard.lengths[document]:,} tokens in {shard.parts[document]} "
                    f"parts, which with gist.links = {links} are {most:,} positions, more than model.max_position = {longest}; "
                    "raise it, or give fewer or shorter parts"
                )

    @property
    def fingerprint(self) -> list[str]:
        """What decides the samples: the hash of each source's tokens and, in a blend, its weights."""
        return [stream.fingerprint for stream in self._streams] + ([] if self._blend is None else [repr(self._blend)])

    def fingerprint_until(self, samples: int) -> list[str]:
        """What decided the first ``samples`` samples: a source or a change of weights that comes later is not in it."""
        if self._blend is None:
            return self.fingerprint
        counters = self._blend.counters(samples)
        given = [f"{s.fingerprint} {n}{_cut_for(legs, n)}" for s, legs, n in zip(self._streams, self._legs, counters) if n]
        return [*given, self._blend.history(samples)]

    def counters(self, samples: int) -> list[int]:
        """How many of the first ``samples`` samples came from each source."""
        return _counters(self._blend, [samples])[0]

    def segments(self, sample: int) -> list[Segment]:
        """The pieces of documents that make up a global sample number; they sum to the length of its stretch, or less where
        documents are whole."""
        source, number = (0, sample) if self._blend is None else self._blend.locate(sample)
        stretch = max(i for i, s in enumerate(self._stretches) if s.begin <= sample)
        return self._streams[source].segments(number, self._legs[source][: self._leg_of[stretch]])

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

    def bundles(self, pieces: Sequence[Segment]) -> list[Bundle | None]:
        """How each piece is made of prefix, parts and suffix; None for one that is no linked context."""
        return [bundle_of(shard.edges(document)) for shard, document in self._located(pieces)]

    def _located(self, pieces: Sequence[Segment]) -> list[tuple[LazyShard, int]]:
        """The shard of each piece, and the document's number within it."""
        shards = np.searchsorted(self._shard_first, [piece.document for piece in pieces], side="right") - 1
        return [(self._shards[s], p.document - int(self._shard_first[s])) for p, s in zip(pieces, shards.tolist())]


def _counters(blend: Blend | None, samples: Sequence[int]) -> list[list[int]]:
    """For each number of samples, how many of them came from each source."""
    return [[n] if blend is None else blend.counters(n) for n in samples]


def _cut_for(legs: Sequence[Leg], given: int) -> str:
    """What decided the windows of a source's first samples beside their number: how many each length was planned to have."""
    plans = [leg.planned for leg in legs if leg.begin < given and leg.planned is not None]
    return f" of {plans}" if plans else ""


def _kind(shards: list[LazyShard], packing: str, setting: str) -> type[CutWindows] | type[PackedWindows]:
    """How the documents of one source become samples, by the kind of its shards."""
    supervised = [shard for shard in shards if shard.info.supervised]
    if not supervised:
        return PackedWindows if packing == "best_fit" else CutWindows
    if len(supervised) < len(shards):
        plain = next(shard for shard in shards if not shard.info.supervised)
        raise UserError(
            f"{setting}: {supervised[0].prefix} is supervised, {plain.prefix} is not; give each kind an entry with a weight "
            "(`PREFIX weight=0.5`), so that each is a source of its own"
        )
    return PackedWindows


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
        self,
        source: TokenSource,
        gist: GistConfig | None,
        tokenizer: RunTokenizer,
        length_multiple: int = 1,
        seed: int = 0,
        shuffle_parts: bool = False,
    ):
        """Check what linked contexts need.

        Args:
            gist: None for dense attention (no gists).
            length_multiple: the padded length is a multiple of it.
            seed: of what training draws for every sample.
            shuffle_parts: draw the order of the parts of linked contexts for every sample.

        Raises:
            UserError: the tokenizer has too few link ids.
        """
        self.tokenizer, self.gist, self.seed = tokenizer, gist, seed
        self._shuffle_parts, self._length_multiple = shuffle_parts, length_multiple
        if gist is not None and source.linked:
            check_links(tokenizer, gist)
        self._read(source)

    def along(self, stretches: Sequence[Stretch], at: int = 0) -> BatchBuilder:
        """The same for one of the stretches of a run's samples (:meth:`TokenSource.along`)."""
        other = copy.copy(self)
        other._read(self.source.along(stretches, at))
        return other

    def _read(self, source: TokenSource) -> None:
        self.source, longest = source, source.raw_tokens
        if self.gist is not None:
            links = self.gist.links * source.parts
            longest = max_interleaved_length(longest, self.gist.chunk_sizes, source.closed, links)
        self.length = -(-longest // self._length_multiple) * self._length_multiple

    def build(self, samples: Sequence[int], stage: GistConfig | None = None) -> MicroBatch:
        """The micro-batch of these global sample numbers, on CPU: ids, labels and layout [len(samples), length].

        stage: how a stage of training recalls; None for recall as the settings have it, without what training draws.
        """
        columns = self._columns(len(samples))
        for row, sample in enumerate(samples):
            made, labels, flags = self._sample(sample, stage)
            given = {"labels": labels, "flags": flags, **{name: getattr(made, name) for name in ("ids", "level", "doc")}}
            if made.role is not None:
                given |= {"role": made.role, "part": made.part}
            for name, values in given.items():
                columns[name][row, : len(values)] = values
        return self._micro_batch(columns, stage or self.gist)

    def empty(self) -> MicroBatch:
        """One sample of padding without any target, for a rank that has nothing to do but must take part."""
        return self._micro_batch(self._columns(1), self.gist)

    def _columns(self, samples: int) -> dict[str, np.ndarray]:
        """Arrays [samples, length] of padding; role and part where any sample of the source may have bundles."""
        shape = (samples, self.length)
        wide = {"ids": np.zeros(shape, np.int64), "labels": np.full(shape, IGNORED, np.int64)}
        places = {name: np.full(shape, -1, np.int32) for name in ("level", "doc")}
        linked = ("role", "part") if self.source.linked else ()
        return wide | places | {name: np.zeros(shape, np.int32) for name in ("flags", *linked)}

    def sample(self, sample: int) -> Interleaved:
        """A global sample number with its gists and links."""
        return self._sample(sample, None)[0]

    def _sample(self, sample: int, stage: GistConfig | None) -> tuple[Interleaved, np.ndarray, np.ndarray]:
        """A sample with its gists and links, and the label and flags of each of its tokens."""
        pieces = self.source.segments(sample)
        raw, spans, bundles = self.source.read(pieces), self.source.spans(pieces), self.source.bundles(pieces)
        lengths = [piece.length for piece in pieces]
        if self._shuffle_parts:
            bundles = shuffle_parts(raw, lengths, bundles, self.seed, sample)
        targets = _targets(raw, lengths, spans)
        if self.gist is None:
            made = without_gists(raw, lengths, bundles)
            return made, targets, np.zeros(len(raw), np.int32)
        contexts = np.array([-1 if own is None or bundle else own[0] for own, bundle in zip(spans, bundles)])
        gist_ids, link_ids = self.tokenizer.gist_ids[: self.gist.levels], self.tokenizer.link_ids[: self.gist.links]
        where = {"contexts": contexts, "bundles": bundles, "link_ids": link_ids}
        made = interleave(raw, lengths, self.tokenizer.word_starts, self.gist, gist_ids, **where)
        labels = np.full(len(made.ids), IGNORED, np.int64)
        labels[made.raw] = targets
        context = contexts[made.doc]
        suffix = made.raw & (context >= 0) & (made.position >= context)
        if made.role is not None:
            suffix |= made.role == Role.SUFFIX
        flags = plain_flags(made, suffix, self.gist)
        if stage is not None:
            flags = sample_flags(made, suffix, stage, self.seed, sample)
        return made, labels, flags

    def _micro_batch(self, columns: dict[str, np.ndarray], gist: GistConfig | None) -> MicroBatch:
        """columns: see :meth:`_columns`; flags: see `unfold.pretrain.data.flags`; gist: how those recall that do."""
        tensors = {name: torch.from_numpy(values) for name, values in columns.items()}
        layout = build_layout(tensors["level"], tensors["doc"], self.gist, tensors.get("role"), tensors.get("part"))
        recall = Recall.from_flags(layout, gist, tensors["flags"]) if columns["flags"].any() else None
        return MicroBatch(tensors["ids"], tensors["labels"], layout, recall)


def step_samples(first: int, global_batch: int, micro_batch: int, data_rank: int, data_size: int) -> list[list[int]]:
    """Samples of this rank's micro-batches in a step that begins with the run's ``first`` sample.

    Every layout sees the samples ``first .. first + global_batch`` in that step.
    """
    per_rank = global_batch // data_size
    mine = range(first + data_rank * per_rank, first + (data_rank + 1) * per_rank)
    return [list(mine[i : i + micro_batch]) for i in range(0, per_rank, micro_batch)]
