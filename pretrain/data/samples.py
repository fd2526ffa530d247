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
from unfold.model.config import GistConfig, sizes_name
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
from unfold.pretrain.data.blend import PLAIN, Arranged, Blend, Stretch, make_blend, parse_entry
from unfold.pretrain.data.choices import drawn, of_all
from unfold.pretrain.data.flags import plain_flags, sample_flags
from unfold.pretrain.data.linked import bundle_of, check_links, shuffle_parts
from unfold.pretrain.data.shards import open_shards
from unfold.pretrain.data.source import Reading, Source
from unfold.pretrain.data.tokenizer import RunTokenizer
from unfold.pretrain.data.windows import Leg, Segment
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
        arranged: Arranged = PLAIN,
        checked: bool = True,
    ):
        """Open the shards.

        Args:
            entries: prefixes, globs of prefixes or URLs, each with an optional weight (`blend.parse_entry`).
            raw_tokens: of every sample; see :meth:`along` for others.
            setting: the configuration key that named them, for messages.
            cache: directory for remote shards.
            arranged: how documents become samples, unless a stretch says.
            checked: whether every source must have samples of this length; False where :meth:`along` and :meth:`check` follow.
        """
        self._setting, self._entries = setting, [parse_entry(entry, setting) for entry in entries]
        is_blend = make_blend(self._entries, setting) is not None
        groups = [[e.pattern] for e in self._entries] if is_blend else [[e.pattern for e in self._entries]]
        self._arranged = arranged
        self._shards: list[LazyShard] = []
        self._sources: list[Source] = []
        for number, patterns in enumerate(groups):
            shards = open_shards(patterns, tokenizer, setting, cache)
            first = sum(len(shard.lengths) for shard in self._shards)
            self._shards += shards
            # One source alone is drawn by the seed itself; further ones must not share its draws.
            key = [seed, number + 1] if is_blend else [seed, 0]
            self._sources.append(Source(shards, first, key, setting, ", ".join(patterns)))
        self._shard_first = np.cumsum([0] + [len(shard.lengths) for shard in self._shards])
        self.tokens = sum(source.stream(arranged).tokens for source in self._sources)
        self.supervised = any(shard.info.supervised for shard in self._shards)
        self.linked = any(shard.linked for shard in self._shards)
        self._follow([Stretch(0, None, raw_tokens)], 0)
        if checked:
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
        arranged = [stretch.arranged or self._arranged for stretch in stretches]
        kinds = [(stretch.raw_tokens, how) for stretch, how in zip(stretches, arranged)]
        # A leg of a source is what neighbouring stretches of one kind have of it; its plan must not follow what is left out.
        firsts = [i for i, kind in enumerate(kinds) if not i or kind != kinds[i - 1]]
        given = _counters(self._blend, [stretches[i].begin for i in firsts])
        wanted = _counters(make_blend(self._entries, self._setting, planned), [planned[i].begin for i in firsts])
        self._leg_of = [sum(i <= stretch for i in firsts) - 1 for stretch in range(len(stretches))]
        self._legs, self._readings = [], []
        for source, begins, plans in zip(self._sources, zip(*given), zip(*wanted)):
            counts = [b - a for a, b in zip(plans, plans[1:])] + [None]
            lengths = [stretches[i].raw_tokens for i in firsts]
            self._legs.append([Leg(*leg) for leg in zip(begins, lengths, counts)])
            self._readings.append(source.readings(self._legs[-1], [arranged[i] for i in firsts]))

    def check(self, stretches: int = 1) -> TokenSource:
        """This source. Raises UserError where documents do not make samples of a length that they have to give in the
        first stretches."""
        begins = [*(stretch.begin for stretch in self._stretches), None][: stretches + 1]
        for number, (begin, end) in enumerate(zip(begins, begins[1:])):
            leg = self._leg_of[number]
            for source, reading in enumerate(self._at_leg(leg)):
                gives = self._blend is None or self._blend.weighs(source, begin, end)
                if gives and self._legs[source][leg].planned != 0:
                    reading.stream.check(self._stretches[number].raw_tokens)
        return self

    def _at_leg(self, leg: int) -> list[Reading]:
        """How each source is read in one of the legs."""
        return [readings[leg] for readings in self._readings]

    def _here(self) -> list[Reading]:
        return self._at_leg(self._leg_of[self._at])

    def shares(self) -> tuple[int, int, float, float]:
        """Of an epoch of every source in samples of this length: documents, as often as they are read, and samples; the share of
        their tokens that is padding, and of the documents those that are cut."""
        streams = [reading.stream for reading in self._here()]
        found = [(stream.entries, stream.per_epoch(self.raw_tokens), *stream.shares(self.raw_tokens)) for stream in streams]
        documents, samples = sum(f[0] for f in found), sum(f[1] for f in found)
        padding = sum(f[1] * f[2] for f in found) / samples
        return documents, samples, padding, sum(f[0] * f[3] for f in found) / documents

    @property
    def closed(self) -> int:
        """Contexts or parts that a sample of the stretch closes at most."""
        return max(reading.most()[0] for reading in self._here())

    @property
    def parts(self) -> int:
        """Parts of linked contexts that a sample of the stretch holds at most."""
        return max(reading.most()[1] for reading in self._here())

    @property
    def samples_per_epoch(self) -> int:
        """Of this length, from all sources."""
        return sum(reading.stream.per_epoch(self.raw_tokens) for reading in self._here())

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
        return [source.fingerprint for source in self._sources] + ([] if self._blend is None else [repr(self._blend)])

    def fingerprint_until(self, samples: int) -> list[str]:
        """What decided the first ``samples`` samples: a source or a change of weights that comes later is not in it."""
        if self._blend is None:
            return self.fingerprint
        counters = self._blend.counters(samples)
        given = [f"{s.fingerprint} {n}{_cut_for(legs, n)}" for s, legs, n in zip(self._sources, self._legs, counters) if n]
        return [*given, self._blend.history(samples)]

    def counters(self, samples: int) -> list[int]:
        """How many of the first ``samples`` samples came from each source."""
        return _counters(self._blend, [samples])[0]

    def segments(self, sample: int) -> list[Segment]:
        """The pieces of documents that make up a global sample number; they sum to the length of its stretch, or less where
        documents are whole."""
        source, number = (0, sample) if self._blend is None else self._blend.locate(sample)
        stretch = max(i for i, s in enumerate(self._stretches) if s.begin <= sample)
        return self._readings[source][self._leg_of[stretch]].segments(number)

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
    """Turns global sample numbers into micro-batches of one fixed shape, or of one for every choice of chunk sizes.

    Attributes:
        length: of samples with `gist.chunk_sizes`, padded; with choices in training of the longest of them.
    """

    def __init__(
        self,
        source: TokenSource,
        gist: GistConfig | None,
        tokenizer: RunTokenizer,
        length_multiple: int = 1,
        seed: int = 0,
        shuffle_parts: bool = False,
        one_length: bool = False,
    ):
        """Check what linked contexts need.

        Args:
            gist: None for dense attention (no gists); its choices are for training.
            length_multiple: the padded length is a multiple of it.
            seed: of what training draws for every sample.
            shuffle_parts: draw the order of the parts of linked contexts for every sample.
            one_length: pad every micro-batch to the longest choice of chunk sizes, not only to the longest of its own.

        Raises:
            UserError: the tokenizer has too few link ids.
        """
        self.tokenizer, self.gist, self.seed = tokenizer, gist, seed
        self._shuffle_parts, self._length_multiple, self._one_length = shuffle_parts, length_multiple, one_length
        if gist is not None and source.linked:
            check_links(tokenizer, gist)
        self._read(source)

    def along(self, stretches: Sequence[Stretch], at: int = 0) -> BatchBuilder:
        """The same for one of the stretches of a run's samples (:meth:`TokenSource.along`)."""
        other = copy.copy(self)
        other._read(self.source.along(stretches, at))
        return other

    def folding(self, gist: GistConfig) -> BatchBuilder:
        """The same samples with other chunk sizes."""
        other = copy.copy(self)
        other.gist = gist
        other._read(self.source)
        return other

    def _read(self, source: TokenSource) -> None:
        self.source = source
        self.length = self._length_of(self.gist.variants if self.gist else [])

    def build(self, samples: Sequence[int], stage: GistConfig | None = None) -> MicroBatch:
        """The micro-batch of these global sample numbers, on CPU: ids, labels and layout [len(samples), length].

        stage: how a stage of training recalls; None for recall as the settings have it, without what training draws.
        """
        gists = [self.gist if stage is None else drawn(stage, self.seed, sample) for sample in samples]
        has_choices = stage is not None and bool(stage.choices)
        columns = self._columns(len(samples), self._length_of(gists) if has_choices and not self._one_length else self.length)
        for row, (sample, gist) in enumerate(zip(samples, gists)):
            made, labels, flags = self._sample(sample, gist, stage is not None)
            given = {"labels": labels, "flags": flags, **{name: getattr(made, name) for name in ("ids", "level", "doc")}}
            if made.role is not None:
                given |= {"role": made.role, "part": made.part}
            for name, values in given.items():
                columns[name][row, : len(values)] = values
        batch = self._micro_batch(columns, gists)
        return replace(batch, drawn=tuple(sizes_name(g.chunk_sizes) for g in gists)) if has_choices else batch

    def empty(self) -> MicroBatch:
        """One sample of padding without any target, for a rank that has nothing to do but must take part."""
        return self._micro_batch(self._columns(1, self.length), [self.gist])

    def _length_of(self, gists: Sequence[GistConfig]) -> int:
        """The padded length of a micro-batch with these settings of its samples; none: without gists."""
        source = self.source
        longest = lambda gist: max_interleaved_length(
            source.raw_tokens, gist.chunk_sizes, source.closed, gist.links * source.parts
        )
        return -(-max(map(longest, gists), default=source.raw_tokens) // self._length_multiple) * self._length_multiple

    def _columns(self, samples: int, length: int) -> dict[str, np.ndarray]:
        """Arrays [samples, length] of padding; role and part where any sample of the source may have bundles."""
        shape = (samples, length)
        wide = {"ids": np.zeros(shape, np.int64), "labels": np.full(shape, IGNORED, np.int64)}
        places = {name: np.full(shape, -1, np.int32) for name in ("level", "doc")}
        linked = ("role", "part") if self.source.linked else ()
        return wide | places | {name: np.zeros(shape, np.int32) for name in ("flags", *linked)}

    def sample(self, sample: int) -> Interleaved:
        """A global sample number with its gists and links."""
        return self._sample(sample, self.gist, False)[0]

    def _sample(self, sample: int, gist: GistConfig | None, trains: bool) -> tuple[Interleaved, np.ndarray, np.ndarray]:
        """A sample with its gists and links, and the label and flags of each of its tokens.

        gist: its own settings; trains: whether what training draws is drawn.
        """
        pieces = self.source.segments(sample)
        raw, spans, bundles = self.source.read(pieces), self.source.spans(pieces), self.source.bundles(pieces)
        lengths = [piece.length for piece in pieces]
        if self._shuffle_parts:
            bundles = shuffle_parts(raw, lengths, bundles, self.seed, sample)
        targets = _targets(raw, lengths, spans)
        if gist is None:
            made = without_gists(raw, lengths, bundles)
            return made, targets, np.zeros(len(raw), np.int32)
        contexts = np.array([-1 if own is None or bundle else own[0] for own, bundle in zip(spans, bundles)])
        gist_ids, link_ids = self.tokenizer.gist_ids[: gist.levels], self.tokenizer.link_ids[: gist.links]
        where = {"contexts": contexts, "bundles": bundles, "link_ids": link_ids}
        made = interleave(raw, lengths, self.tokenizer.word_starts, gist, gist_ids, **where)
        labels = np.full(len(made.ids), IGNORED, np.int64)
        labels[made.raw] = targets
        context = contexts[made.doc]
        suffix = made.raw & (context >= 0) & (made.position >= context)
        if made.role is not None:
            suffix |= made.role == Role.SUFFIX
        flags = sample_flags(made, suffix, gist, self.seed, sample) if trains else plain_flags(made, suffix, gist)
        return made, labels, flags

    def _micro_batch(self, columns: dict[str, np.ndarray], gists: Sequence[GistConfig | None]) -> MicroBatch:
        """columns: see :meth:`_columns`; flags: see `unfold.pretrain.data.flags`; gists: the settings of each sample."""
        mixed = len(set(gists)) > 1
        gist = of_all(gists) if mixed else gists[0]
        tensors = {name: torch.from_numpy(values) for name, values in columns.items()}
        layout = build_layout(tensors["level"], tensors["doc"], gist, tensors.get("role"), tensors.get("part"))
        recall = None
        if columns["flags"].any():
            recall = Recall.from_flags(layout, gist, tensors["flags"], samples=gists if mixed else ())
        return MicroBatch(tensors["ids"], tensors["labels"], layout, recall)


def step_samples(first: int, global_batch: int, micro_batch: int, data_rank: int, data_size: int) -> list[list[int]]:
    """Samples of this rank's micro-batches in a step that begins with the run's ``first`` sample.

    Every layout sees the samples ``first .. first + global_batch`` in that step.
    """
    per_rank = global_batch // data_size
    mine = range(first + data_rank * per_rank, first + (data_rank + 1) * per_rank)
    return [list(mine[i : i + micro_batch]) for i in range(0, per_rank, micro_batch)]
