"""What a step has to do: parameters, tokens, visible keys, useful FLOPs. Counted, not estimated, where that is possible."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, fields

import numpy as np
import torch

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.gist import Layout, build_layout, interleave, max_interleaved_length
from unfold.model.hf.names import model_entries
from unfold.model.parallel.context import make_plan
from unfold.model.parallel.division import Division, imbalance, visible_pairs
from unfold.pretrain.config import ParallelConfig, RunConfig


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
        layers: the same by kind of layer, with the part of the layers that are of it; then the numbers above are means over
            layers, and where that says nothing the largest. Empty where all layers are of the model's one kind.
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
    layers: tuple[tuple[float, str, SampleSize], ...] = ()

    def by_kind(self, attention: str) -> tuple[tuple[float, str, SampleSize], ...]:
        """(part of the layers, kind, size); attention: the model's, of all layers where they are of one kind."""
        return self.layers or ((1.0, attention, self),)


def measure_sample(config: RunConfig, attention: str | None = None) -> SampleSize:
    """Lay out one sample of the configured length and count. attention: another than the configuration's."""
    parallel, raw = config.parallel, config.data.raw_tokens
    folded = (attention or config.model.attention) == "gist"
    gist = config.gist if folded else GistConfig((raw,))
    multiple = parallel.length_multiple
    longest = max_interleaved_length(raw, gist.chunk_sizes) if folded else raw
    length = -(-longest // multiple) * multiple
    if attention == "dense" or set(config.model.layer_kinds) == {"dense"}:
        return SampleSize(raw, raw, length, raw * (raw + 1) // 2, length // parallel.context, 0, length, 2)
    layout, tokens = _lay_out(raw, length, gist, folded)
    layers = config.model.layer_kinds
    counts = Counter(layers)
    division = None
    if parallel.gists_ranks > 1:
        pattern = config.model.layer_attention or layers[:1]
        division = Division.even([layout.in_layer(kind).intervals for kind in pattern], parallel.gists_ranks)
    sizes = {kind: _size_in(layout.in_layer(kind), tokens, raw, division, parallel) for kind in counts}
    if division is not None:
        pairs = [count * np.array(visible_pairs(layout.in_layer(kind).intervals, division)) for kind, count in counts.items()]
        uneven = imbalance(sum(pairs).tolist())
        sizes = {kind: dataclasses.replace(size, imbalance=uneven) for kind, size in sizes.items()}
    if len(sizes) == 1:
        return next(iter(sizes.values()))
    of_layers = tuple((count / len(layers), kind, sizes[kind]) for kind, count in counts.items())
    mean = lambda name: sum(part * getattr(size, name) for part, _, size in of_layers)
    largest = max(sizes.values(), key=lambda size: size.near)
    return dataclasses.replace(largest, keys=round(mean("keys")), sent=round(mean("sent")), layers=of_layers)


def _size_in(layout: Layout, tokens: int, raw: int, division: Division | None, parallel: ParallelConfig) -> SampleSize:
    """Of layers of one kind. layout: theirs; division: over ranks that exchange keys."""
    length, segments, keys = layout.intervals.tokens, layout.intervals.segments, _visible_keys(layout, tokens)
    if division is None:
        rows, context = layout.intervals.rows.shape[1], parallel.context
        return SampleSize(raw, tokens, length, keys, length // context, 0, rows // context, segments)
    latest = max(range(division.ranks), key=lambda rank: division.spans[rank][-1])  # of all, the last token sees most
    plan = make_plan(layout, division, latest)
    near, sent = plan.layout.intervals, plan.exports.exported.shape[1]
    # A rank that trades heads has as many tokens of a part of the heads as if it had this part of the tokens of all heads.
    of_heads = lambda number: -(-number // parallel.heads_ranks)
    return SampleSize(raw, tokens, length, keys, of_heads(near.tokens), of_heads(sent), of_heads(near.rows.shape[1]), segments)


def _lay_out(raw: int, length: int, gist: GistConfig, folded: bool) -> tuple[Layout, int]:
    """The layout of one document of ``raw`` tokens, padded to ``length``, and its interleaved length; folded: with gists."""
    level, doc, tokens = np.full(raw, -1), np.zeros(raw, np.int64), raw
    if folded:
        made = interleave(np.zeros(raw, np.int64), [raw], np.ones(1, bool), gist, range(1, gist.levels + 1))
        level, doc, tokens = made.level, made.doc, len(made.ids)
    pad = lambda x: torch.from_numpy(np.pad(x, (0, length - tokens), constant_values=-1))[None]
    return build_layout(pad(level), pad(doc), gist if folded else None), tokens


def _visible_keys(layout: Layout, tokens: int) -> int:
    """The sum of hi - lo over the first ``tokens`` queries (padding sees itself, which is no work)."""
    intervals = layout.intervals
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
    pairs = model.layers * model.heads * model.head_dim * sample.keys
    matrices = count_parameters(model).layers
    return Flops(6 * matrices * sample.tokens * samples, 6 * head * sample.raw * samples, 12 * pairs * samples)
