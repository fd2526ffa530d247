"""A dense model that has learned to quote, then each way of going on: the same samples and steps, other settings.

The settings are read, and the batches made, as in training (`unfold.pretrain`); the update is Muon in fp32, which small models on
CPU learn fastest with, and which DeepSpeed would clip wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.quotes.data import PLAIN, Quoting, Repeating
from tests.benchmarks.quotes.ways import Way
from tests.benchmarks.recall_claim.training import Optimizer
from unfold.data_prep.format.shards import open_shard
from unfold.model.config import GistConfig
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer
from unfold.model.visibility import IGNORED, AddedLosses, MicroBatch
from unfold.pretrain.config import DistillConfig, RunConfig, parse_config
from unfold.pretrain.evaluate.perplexity import pack_losses, packs, run_pack, take_windows
from unfold.pretrain.evaluate.subject import Subject, Variant
from unfold.pretrain.monitor.probe import looking
from unfold.pretrain.monitor.routing import RoutingMeasure
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.train.inputs import open_inputs

FIRST = 2  # tokens of a quote that nothing tells beforehand: they say which quote it is


@dataclass(frozen=True)
class Plan:
    """How long the stages are, and the size of the models.

    Attributes:
        short: what the dense model learns to copy from first, almost alone: quotes in text teach it too little at the start.
        quoting: what the dense model learns from next; all ways are trained and measured on it, or on the last of ``lengths``.
        short_steps, base_steps: of the dense model in short and in whole samples.
        copies: None, or the mean loss per token of a hundred steps in short samples below which the dense model copies: it then
            goes on with them until it does, for at most four times ``short_steps``. When that comes differs between seeds.
        lengths: of longer samples, in which the dense model goes on, one length after the other.
        length_steps: in each of them.
        settings: (dotted key, value) of further settings: those of the model hold for all, others for ways with gists.
        steps: of each way.
        batch: raw tokens of a step.
        evaluated: validation documents that quote, and windows of plain text.
        documents: short ones that quote; of whole ones so many that there are as many tokens.
    """

    short: Repeating = Repeating()
    quoting: Quoting = Quoting(256, 24, 4, 12)
    short_steps: int = 800
    copies: float | None = None
    base_steps: int = 300
    lengths: tuple[int, ...] = ()
    length_steps: int = 150
    settings: tuple[tuple[str, Any], ...] = ()
    steps: int = 300
    batch: int = 1024
    evaluated: int = 64
    documents: int = 16384
    vocab_size: int = 512
    layers: int = 3
    hidden_size: int = 64
    heads: int = 1
    kv_heads: int = 1
    lr: float = 3e-3
    matrix_lr: float = 0.02

    @property
    def stages(self) -> list[tuple[str, Quoting]]:
        """(name of the shards, what they hold) of text that quotes, by its length."""
        longer = [(f"quotes{n}", dataclasses.replace(self.quoting, raw_tokens=n)) for n in self.lengths]
        return [("quotes", self.quoting), *longer]

    @property
    def whole(self) -> Quoting:
        """What all ways are trained and measured on."""
        return self.stages[-1][1]

    def config(self, data: Path, name: str, raw_tokens: int, seed: int, tree: dict, share: float = 0.5) -> RunConfig:
        """The configuration of a run on plain text and on text that quotes. name: of the latter's shards; share: its part."""
        samples = max(1, self.batch // raw_tokens)
        own = {
            "precision": "fp32",
            "model": {
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "layers": self.layers,
                "heads": self.heads,
                "kv_heads": self.kv_heads,
                "ffn_size": 2 * self.hidden_size,
                "init_std": self.hidden_size**-0.5,
            },
            "data": {
                "train": [f"{data / 'text_train'} weight={1 - share}", f"{data / name}_train weight={share}"],
                "tokenizer": str(data / "tokenizer"),
                "raw_tokens": raw_tokens,
            },
            "train": {"seed": seed, "global_batch": samples, "micro_batch": samples},
        }
        for section, values in tree.items():
            own[section] = {**own.get(section, {}), **values}
        own["model"] |= self.further("model")
        return parse_config(own)

    def further(self, section: str) -> dict[str, Any]:
        """Those of ``settings`` that belong to a section."""
        parts = [(*key.split(".", 1), value) for key, value in self.settings]
        return {name: value for of, name, value in parts if of == section}


@dataclass(frozen=True)
class Reading:
    """What a model loses, in nats per token.

    Attributes:
        quote: on quoted tokens, from the third of a quote on.
        between: on the other tokens of the half that quotes.
        plain: on text without quotes.
        plain_late: on its second half.
        unfolded: raw tokens that a token unfolds, a mean over layers.
    """

    quote: float
    between: float
    plain: float
    plain_late: float
    unfolded: float


def train(model: Transformer, config: RunConfig, parallel: Parallel, plan: Plan, decay: bool) -> Iterator[tuple[int, float]]:
    """Train in place; yields (step, loss per token) after every step."""
    steps = config.train.steps
    optimizer = Optimizer(model, plan, steps, decay)
    batches = open_inputs(config).batches(0, lambda number: number, parallel)
    for step, (batch,) in enumerate(batches, 1):
        loss = loss_of(model, batch, config.at(step).folding, config.distill)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step, loss.item()


def loss_of(model: Transformer, batch: MicroBatch, gist: GistConfig | None, distill: DistillConfig) -> Tensor:
    """Mean next-token loss of a step, scalar; routing loss and distillation are in its gradient, as in training."""
    tokens, config = int((batch.labels != IGNORED).sum()), model.config
    if batch.recall and batch.recall.routing:
        layers = config.layers - gist.recall_from
        terms = batch.recall.routing.routed.tree.queries * config.heads * layers
        batch = dataclasses.replace(batch, recall=batch.recall.weighing(gist.route_loss / terms))
    if batch.distilled:
        raw = int(((batch.layout.level < 0) & (batch.layout.doc >= 0)).sum())
        hidden = distill.hidden * tokens / (raw * config.hidden_size * config.layers)
        batch = dataclasses.replace(batch, added=AddedLosses(logits=distill.logits, hidden=hidden, samples=batch.distilled))
    return model(batch) / tokens


def dense_config(plan: Plan, data: Path, seed: int, stage: int = 0) -> RunConfig:
    """The configuration of the dense model's second part, in whole samples; stage: which of ``plan.stages``."""
    tree = {"model": {"attention": "dense"}, "train": {"steps": plan.length_steps if stage else plan.base_steps}}
    name, quoting = plan.stages[stage]
    return plan.config(data, name, quoting.raw_tokens, 100 * seed + 1 + stage, tree)


def base_model(plan: Plan, data: Path, parallel: Parallel, build: BuildContext) -> Transformer:
    """The dense model that all ways of a seed (``build.seed``) start from, before it goes on in longer samples."""
    most = plan.short_steps * (1 if plan.copies is None else 4)
    tree = {"model": {"attention": "dense"}, "train": {"steps": most}}
    short = plan.config(data, "short", plan.short.raw_tokens, 100 * build.seed, tree, share=0.98)
    model = Transformer(short.model, build)
    lost: list[float] = []
    for _, loss in train(model, short, parallel, plan, decay=False):
        lost.append(loss)
        if plan.copies is not None and len(lost) % 100 == 0 and np.mean(lost[-100:]) < plan.copies:
            break
    return longer_model(model, plan, data, parallel, 0)


def longer_model(model: Transformer, plan: Plan, data: Path, parallel: Parallel, stage: int) -> Transformer:
    """The same dense model, trained on in samples of one of ``plan.stages``; gists then start as the mean of all other rows."""
    config = dense_config(plan, data, model.build.seed, stage)
    for _ in train(model, config, parallel, plan, decay=False):
        pass
    rows = model.embedding.weight
    known = torch.arange(len(rows)) < plan.vocab_size  # the rest is padding
    gists = list(open_inputs(config).tokenizer.reserved_ids)
    known[gists] = False
    with torch.no_grad():
        rows[gists] = rows[known].mean(0)
    return model


def way_config(plan: Plan, data: Path, way: Way, chunk_sizes: tuple[int, ...], seed: int) -> RunConfig:
    """The configuration of a way; ways of a seed see the same samples in the same order."""
    tree = way.tree(max(1, round(plan.steps * way.longer)), chunk_sizes)
    name, quoting = plan.stages[-1]
    if tree["gist"].get("route_loss"):  # of all tokens of a sample, however long it is
        tree["gist"]["route_queries"] = max(GistConfig.route_queries, quoting.raw_tokens)
    if not way.dense:
        for section in ("gist", "distill"):
            tree[section] = {**tree.get(section, {}), **plan.further(section)}
    return plan.config(data, name, quoting.raw_tokens, 100 * seed + 50, tree)


def started_from(base: Transformer, config: RunConfig) -> Transformer:
    """A model of this configuration with the base's weights."""
    model = Transformer(config.model, dataclasses.replace(base.build, blank=True))
    model.load_state_dict(base.state_dict())
    return model


def readings(model: Transformer, config: RunConfig, plan: Plan, data: Path) -> tuple[dict[str, Reading], float | None]:
    """How well a trained model quotes, by way of reading; and its far coverage of level 0, None where it is dense.

    Ways of reading: 'dense' (no gists), 'everything' (with gists, all of them unfolded), and where it was trained with gists
    'forget' and 'recall', the latter with the budget that holds at the end.
    """
    tokenizer = open_inputs(config).tokenizer
    shards, length = plan.stages[-1][0], plan.whole.raw_tokens
    gist = dataclasses.replace(config.gist, recall="all")
    variants = {"dense": Variant("dense", None)}
    if config.folding:
        variants["forget"] = Variant("forget", gist)
        variants["recall"] = Variant("recall", dataclasses.replace(gist, unfold_all=False))
    variants["everything"] = Variant("recall", dataclasses.replace(gist, unfold_all=True))
    subject = Subject("", model.eval(), tokenizer, tuple(variants.values()), length)
    tags = np.load(data / f"{shards}_tags.npy")[: plan.evaluated]
    shard = open_shard(data / f"{shards}_valid")
    quoting = [np.asarray(shard.document(i), np.int64) for i in range(len(tags))]
    text = open_shard(data / "text_valid")
    documents = (np.asarray(text.document(i), np.int64) for i in range(len(text.lengths)))
    plain = [w for w in take_windows(documents, length, 2**40) if len(w) == length][: plan.evaluated]
    found = {}
    for name, variant in variants.items():
        lost, unfolded = _losses(subject, variant, quoting)
        of_plain, _ = _losses(subject, variant, plain)
        quoted, later = tags[:, 1:] >= FIRST, np.arange(1, length) >= length // 2
        found[name] = Reading(
            quote=float(lost[quoted].mean()),
            between=float(lost[(tags[:, 1:] == PLAIN) & later].mean()),
            plain=float(of_plain.mean()),
            plain_late=float(of_plain[:, later].mean()),
            unfolded=unfolded,
        )
    if not config.folding:
        return found, None
    measure = RoutingMeasure(variants["recall"].gist, model.config.layers, once=False)
    with looking(model, measure.look):
        for group in packs(quoting):
            run_pack(subject, variants["recall"], group)
    return found, measure.overall()["far_coverage_0"]


def _losses(subject: Subject, variant: Variant, windows: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """Of windows of one length: nats [windows, length - 1] of all tokens but the first; raw tokens unfolded, in the mean."""
    parts = [pack_losses(subject, variant, group) for group in packs(windows)]
    unfolded = [x for _, read in parts for x in read]
    return np.concatenate([lost for lost, _ in parts]).reshape(len(windows), -1), float(np.mean(unfolded)) if unfolded else 0.0
