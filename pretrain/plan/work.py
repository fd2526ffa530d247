"""What a step has to do: parameters, tokens, visible keys, useful FLOPs. Counted, not estimated, where that is possible."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from unfold.kernels.intervals import Intervals
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.gist import Layout, build_layout, interleave, max_interleaved_length, recalls_in
from unfold.model.hf.names import model_entries
from unfold.model.parallel.context import make_plan
from unfold.model.parallel.division import Division, imbalance, visible_pairs
from unfold.model.parallel.recall import RecallPlan, make_recall_plan
from unfold.pretrain.config import ParallelConfig, RunConfig
from unfold.pretrain.plan.recall import (
    SUFFIX,
    Recalling,
    block_rows,
    gists_seen,
    measure_recall,
    raw_before,
    raw_missing,
    recall_of,
    wanted,
)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of one rank, or of the whole model.

    Attributes:
        layers: in the layers' matrices; every token is multiplied with each.
        embedding: in the input embedding; looked up, not multiplied.
        head: in the output head where it is a weight of its own.
        vectors: norm weights and biases.
    """

    layers: int
    embedding: int
    head: int
    vectors: int

    @property
    def total(self) -> int:
        return self.layers + self.embedding + self.head + self.vectors


def count_parameters(model: ModelConfig, tensor: int = 1, stage: int = 0, stages: int = 1) -> Parameters:
    """Those of one rank of a pipeline stage; the whole model's with the defaults. A tied embedding is held by both ends."""
    first, last = stage == 0, stage == stages - 1
    held = {"embedding": first or last and model.tied_embeddings, "head": last, "final_norm": last}
    counts = dict.fromkeys((f.name for f in fields(Parameters)), 0)
    for entry in model_entries(model):
        part = entry.ours.split(".")[0]
        copies = model.layers // stages if part == "layers" else int(held[part])
        kind = "vectors" if len(entry.shape(model)) == 1 else part
        counts[kind] += copies * entry.numel(model) // (1 if entry.partition is None else tensor)
    return Parameters(**counts)


@dataclass(frozen=True)
class SampleSize:
    """The lengths of one sample: a single document in which every token starts a word, so chunks are as short as they get.

    Attributes:
        raw: raw tokens.
        tokens: raw tokens and gists.
        length: that, padded to the batch's fixed length.
        keys: (query, key) pairs that one layer's attention computes: the sum of hi - lo over all queries and segments.
        near: tokens of the sequence that the busiest rank of a context-parallel group attends over, its own included; of all
            heads: where it has a part of them, that part of the tokens. So with the next two.
        sent: tokens whose keys and values a rank sends to each of the others that it exchanges gists with, per layer.
        key_rows: keys in level-sorted order, sink copies included, of that sequence.
        segments: ranges per query.
        imbalance: most (query, key) pairs of a rank that shares the sequence over the mean of them all.
        recall: what comes on top where tokens recall; None where none does.
        layers: kind and size of every layer; then the numbers above are means over layers, and where that says nothing the
            largest. Empty where all layers are alike.
    """

    raw: int
    tokens: int
    length: int
    keys: int
    near: int
    sent: int
    key_rows: int
    segments: int
    imbalance: float = 1.0
    recall: Recalling | None = None
    layers: tuple[tuple[str, SampleSize], ...] = ()

    def by_kind(self, attention: str) -> tuple[tuple[float, str, SampleSize], ...]:
        """(part of the layers, kind, size); attention: the model's, of all layers where they are alike."""
        if not self.layers:
            return ((1.0, attention, self),)
        return tuple((count / len(self.layers), *layer) for layer, count in Counter(self.layers).items())

    @property
    def recalls(self) -> bool:
        """Whether queries of the layer select."""
        return self.recall is not None and self.recall.part > 0

    @property
    def pairs(self) -> float:
        """Useful (query, key) pairs of a layer: those of ``keys``, and what recall adds."""
        recalling = [(part, size.recall) for part, _, size in self.by_kind("gist") if size.recall]
        return self.keys + sum(part * recall.part * recall.pairs for part, recall in recalling)

    def of_stage(self, stage: int, stages: int) -> SampleSize:
        """In the layers of one pipeline stage."""
        count = len(self.layers) // stages
        return _joined(self.layers[stage * count : (stage + 1) * count]) if count else self


def _joined(layers: Sequence[tuple[str, SampleSize]]) -> SampleSize:
    """Of several layers."""
    if len(set(layers)) == 1:
        return dataclasses.replace(layers[0][1], layers=tuple(layers))
    mean = lambda name: round(sum(getattr(size, name) for _, size in layers) / len(layers))
    largest = max((size for _, size in layers), key=lambda size: size.near)
    return dataclasses.replace(largest, keys=mean("keys"), sent=mean("sent"), recall=None, layers=tuple(layers))


def measure_sample(config: RunConfig, attention: str | None = None, suffix: float = SUFFIX) -> SampleSize:
    """Lay out one sample of the configured length and count. attention: another than the configuration's; suffix: part of the
    raw tokens that recall under ``gist.recall: suffix``."""
    parallel, raw = config.parallel, config.data.raw_tokens
    folded = (attention or config.model.attention) == "gist"
    gist = config.gist if folded else GistConfig((raw,))
    multiple = parallel.length_multiple
    longest = max_interleaved_length(raw, gist.chunk_sizes) if folded else raw
    length = -(-longest // multiple) * multiple
    if attention == "dense" or set(config.model.layer_kinds) == {"dense"}:
        return SampleSize(raw, raw, length, raw * (raw + 1) // 2, length // parallel.context, 0, length, 2)
    layout, tokens = lay_out(raw, length, gist, folded)
    kinds = config.model.layer_kinds
    division = None
    if parallel.gists_ranks > 1:
        pattern = config.model.layer_attention or kinds[:1]
        division = Division.even([layout.in_layer(kind).intervals for kind in pattern], parallel.gists_ranks)
    recalls = folded and gist.recall != "none"
    which = [(kind, recalls and recalls_in(index, gist.recall_from, kind)) for index, kind in enumerate(kinds)]
    sizes = {}
    for kind, recalling in dict.fromkeys(which):
        sizes[kind, recalling] = _size_in(layout.in_layer(kind), tokens, raw, division, parallel)
        if recalling:
            sizes[kind, recalling] = _with_recall(sizes[kind, recalling], config, layout, division, suffix)
    if division is not None:
        pairs = [
            count * np.array(visible_pairs(layout.in_layer(kind).intervals, division)) for kind, count in Counter(kinds).items()
        ]
        uneven = imbalance(sum(pairs).tolist())
        sizes = {layer: dataclasses.replace(size, imbalance=uneven) for layer, size in sizes.items()}
    if len(sizes) == 1:
        return next(iter(sizes.values()))
    return _joined([(layer[0], sizes[layer]) for layer in which])


def _size_in(layout: Layout, tokens: int, raw: int, division: Division | None, parallel: ParallelConfig) -> SampleSize:
    """Of layers of one kind. layout: theirs; division: over ranks that exchange keys."""
    length, segments, keys = layout.intervals.tokens, layout.intervals.segments, _visible_keys(layout.intervals, tokens)
    if division is None:
        rows, context = layout.intervals.rows.shape[1], parallel.context
        return SampleSize(raw, tokens, length, keys, length // context, 0, rows // context, segments)
    plan = make_plan(layout, division, _latest(division))
    near, sent = plan.layout.intervals, plan.exports.exported.shape[1]
    size = SampleSize(raw, tokens, length, keys, near.tokens, sent, near.rows.shape[1], segments)
    return _of_heads(size, parallel.heads_ranks)


def _latest(division: Division) -> int:
    """The rank with the last tokens, which see most."""
    return max(range(division.ranks), key=lambda rank: division.spans[rank][-1])


def _of_heads(size: SampleSize, ranks: int) -> SampleSize:
    """Of one of so many ranks that trade heads: it has as many tokens of a part of the heads as if it had this part of the tokens
    of all heads."""
    share = {name: -(-getattr(size, name) // ranks) for name in ("near", "sent", "key_rows")}
    return dataclasses.replace(size, **share)


def _with_recall(size: SampleSize, config: RunConfig, layout: Layout, division: Division | None, suffix: float) -> SampleSize:
    """Of a layer that recalls. size: of one that forgets; division: over ranks that exchange keys."""
    gist, model, parallel = config.gist, config.model, config.parallel
    wide = 1.0 if gist.unfold_all else gist.unfold_share
    selecting = 0.0 if gist.unfold_all else 1 - gist.unfold_share - gist.forget_share
    if wide:
        unfolding = recall_of(layout, gist, suffix, everything=True)
        keys = _visible_keys(unfolding.tree.others, size.tokens)
        size = dataclasses.replace(size, keys=round(size.keys + wide * (keys - size.keys)))
        if division is not None:
            plan = make_recall_plan(unfolding.tree, division, _latest(division))
            size = _of_heads(_exchanged(size, plan), parallel.heads_ranks)
    recall = recall_of(layout, gist, suffix, everything=False)
    if recall is None:
        return size
    group, rows = model.heads // model.kv_heads, block_rows(model.head_dim, 2 if config.precision == "bf16" else 4)
    found = measure_recall(recall.tree, gist, group, rows, gists_seen(layout, recall.tree))
    if division is not None:
        plan, heads = make_recall_plan(recall.tree, division, _latest(division)), parallel.heads_ranks
        fetched = raw_missing(plan) * wanted(plan.short, gist, group, model.heads // parallel.tensor // heads)
        here, gists, pairs = _exchanged(size, plan), found.gists / parallel.context, found.pairs
        found = measure_recall(plan.short, gist, group, rows, 0).divided(heads)
        fetched, all_rows = round(fetched / heads), -(-round(here.key_rows + fetched) // heads)
        found = dataclasses.replace(found, rows=all_rows, fetched=fetched, gists=gists, pairs=pairs)
        size = _larger(size, _of_heads(here, heads))
    elif parallel.context > 1:
        found = dataclasses.replace(found.divided(parallel.context), rows=size.key_rows)
    routed = 0.0
    if gist.route_loss:
        routed = gist.route_queries * (1 - gist.forget_share) * raw_before(layout, recall.tree) / parallel.context
    return dataclasses.replace(size, recall=dataclasses.replace(found, part=selecting, routed=routed))


def _exchanged(size: SampleSize, plan: RecallPlan) -> SampleSize:
    """What a rank of a recall plan has and sends before it selects."""
    sent, rows = plan.exports.exported.shape[1], plan.short.others.rows.shape[1]
    return dataclasses.replace(size, near=plan.short.others.tokens, sent=sent, key_rows=rows)


def _larger(size: SampleSize, other: SampleSize) -> SampleSize:
    """The larger of what ranks have and send in either case."""
    largest = {name: max(getattr(size, name), getattr(other, name)) for name in ("near", "sent", "key_rows")}
    return dataclasses.replace(size, **largest)


def lay_out(raw: int, length: int, gist: GistConfig, folded: bool) -> tuple[Layout, int]:
    """The layout of one document of ``raw`` tokens, padded to ``length``, and its interleaved length; folded: with gists."""
    level, doc, tokens = np.full(raw, -1), np.zeros(raw, np.int64), raw
    if folded:
        made = interleave(np.zeros(raw, np.int64), [raw], np.ones(1, bool), gist, range(1, gist.levels + 1))
        level, doc, tokens = made.level, made.doc, len(made.ids)
    pad = lambda x: torch.from_numpy(np.pad(x, (0, length - tokens), constant_values=-1))[None]
    return build_layout(pad(level), pad(doc), gist if folded else None), tokens


def _visible_keys(intervals: Intervals, tokens: int) -> int:
    """The sum of hi - lo over the first ``tokens`` queries (padding sees itself, which is no work)."""
    return int((intervals.hi - intervals.lo)[..., :tokens].sum(dtype=torch.int64))


@dataclass(frozen=True)
class Flops:
    """Useful FLOPs, forward and backward, without recomputation and without what padding costs."""

    matrices: int
    head: int
    attention: int

    @property
    def total(self) -> int:
        return self.matrices + self.head + self.attention


FLOPS_FORMULA = (
    "6 x layer matrices x (raw + gist tokens) + 6 x head x raw tokens "
    "+ 12 x layers x heads x head_dim x visible (query, key) pairs"
)


def count_flops(model: ModelConfig, sample: SampleSize, samples: int) -> Flops:
    """Those of a number of samples: a multiplication and an addition in forward, two of each in backward.

    Only raw tokens reach the output head. A visible pair costs head_dim in the score and head_dim in the weighted sum.
    """
    head = model.padded_vocab_size * model.hidden_size
    pairs = round(model.layers * model.heads * model.head_dim * sample.pairs)
    matrices = count_parameters(model).layers
    return Flops(6 * matrices * sample.tokens * samples, 6 * head * sample.raw * samples, 12 * pairs * samples)
