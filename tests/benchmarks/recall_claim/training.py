"""One model through its stages: look-ups with dense attention, then forgetting, then each way of going on.

Every arm takes the same number of steps on the same samples; only who sees whom, and the routing loss, differ. Starting from a
dense model is what the method is made for (continued pretraining), and lets all arms of a seed share their first stage.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.recall_claim.arms import DENSE, WAYS, GistArm, Way, dense_arm, gist_arm, states
from tests.benchmarks.recall_claim.task import LookupTask
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.layers import BuildContext
from unfold.model.loss import Targets, token_loss_sum
from unfold.model.transformer import Transformer
from unfold.model.visibility import IGNORED, MicroBatch

# (context, steps): so many steps on contexts of this length, of which a batch holds as many as fit into the room of whole ones.
# Short contexts come first: look-ups are learned far faster there, by every arm.
Stage = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """How long the stages are, and the size of the models.

    Attributes:
        base: dense, what all arms of a seed start from.
        forget: with gists; only some ways recall in it. The dense arm stays dense.
        branch: each arm by itself.
        batch: contexts of the task's length per step.
        evaluated: contexts that accuracy is measured on, the same for all arms, never trained on.
        context: their length, where it is longer than the task's; what is asked stays the same.
    """

    base: Stage = ((32, 350), (64, 150), (256, 100))
    forget: Stage = ((32, 150), (64, 150), (256, 150))
    branch: Stage = ((64, 100), (256, 250))
    batch: int = 8
    evaluated: int = 128
    lr: float = 3e-3
    matrix_lr: float = 0.005
    layers: int = 3
    hidden_size: int = 64
    heads: int = 1
    task: LookupTask = LookupTask()
    context: int = 256

    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.task.vocab_size,
            hidden_size=self.hidden_size,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            ffn_size=2 * self.hidden_size,
            init_std=self.hidden_size**-0.5,
            # Look-ups are by content: rotary positions leave only the slow half of so small a head to tell keys apart.
            nope_layers=tuple(range(1, self.layers)),
        )


@dataclass(frozen=True)
class Outcome:
    """What one arm reached.

    Attributes:
        chunk_sizes: empty for dense attention.
        one_hop, two_hop: share of the questions that were answered rightly.
        loss: mean cross-entropy of the answers, nats.
        alone: share of the questions of one hop that were answered rightly when nothing recalls; as one_hop for dense attention.
        unfolded: raw tokens that a question unfolded, a mean over layers; 0 where nothing recalls.
        train_s: seconds of the arm's own stages.
    """

    seed: int
    arm: str
    chunk_sizes: tuple[int, ...]
    one_hop: float
    two_hop: float
    loss: float
    alone: float
    unfolded: float
    train_s: float

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


class Optimizer:
    """Muon for the layers' matrices, AdamW for the rest; the rate rises over 20 steps and falls linearly at the end."""

    def __init__(self, model: Transformer, plan: Plan, steps: int, decay: bool):
        matrices = [p for p in model.layers.parameters() if p.ndim == 2]
        rest = [p for n, p in model.named_parameters() if p.ndim != 2 or not n.startswith("layers.")]
        muon = torch.optim.Muon(matrices, lr=plan.matrix_lr, weight_decay=0.01)
        self._parts = [muon, torch.optim.AdamW(rest, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0)]
        falls = lambda step: min(1.0, (steps - step) / (0.5 * steps)) if decay else 1.0
        rate = lambda step: min(1.0, (step + 1) / 20) * falls(step)
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(part, rate) for part in self._parts]

    def step(self) -> None:
        for part in [*self._parts, *self._schedules]:
            part.step()
        for part in self._parts:
            part.zero_grad()


def train_stage(
    model: Transformer, way: Way | None, plan: Plan, gist: GistConfig | None, stage: Stage, key: list[int], decay: bool = False
) -> float:
    """Train in place; returns the seconds it took.

    Args:
        way: None: dense attention.
        gist: None: no gists. Nothing recalls in this stage where its ``recall`` is 'none'.
        key: what the samples are drawn from, the same for all arms of a stage.
    """
    began, done = time.monotonic(), 0
    samples = np.random.default_rng(key)
    draw = torch.Generator().manual_seed(sum(key))
    optimizer = Optimizer(model, plan, sum(steps for _, steps in stage), decay)
    longest = max(context for context, _ in stage)
    for context, steps in stage:
        task = plan.task.scaled(context)
        size = max(1, plan.batch * plan.task.context // context)
        for _ in range(steps):
            now = gist
            if way is not None and gist.recall != "none":
                if way.forget_every and done % way.forget_every == 0:
                    now = dataclasses.replace(gist, recall="none")
                elif way.wide and context < min(longest, plan.task.context):
                    now = dataclasses.replace(gist, unfold_all=True)
            loss_of(model, way, now, task.batch(samples, size, now), draw).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
    return time.monotonic() - began


def loss_of(model: Transformer, way: Way | None, gist: GistConfig | None, batch: MicroBatch, draw: torch.Generator) -> Tensor:
    """Mean cross-entropy of the answers and the mean routing loss, scalar."""
    heads = model.config.heads
    routing = batch.recall and batch.recall.routing
    if routing:
        terms = routing.routed.tree.queries * heads * (model.config.layers - gist.recall_from)
        batch = dataclasses.replace(batch, recall=batch.recall.weighing(gist.route_loss / terms))
    attend = dense_arm(batch) if way is None else gist_arm(way, gist, batch, heads, model.config.kv_heads, draw)
    losses = token_loss_sum(states(model, attend, batch), Targets.of(batch.labels), model.head_weight, model.build)
    loss = losses / (batch.labels != IGNORED).sum()
    if routing and isinstance(attend, GistArm):
        loss = loss + batch.recall.routing.scale * sum(attend.routed)
    elif routing:  # in the gradient already
        loss = loss + batch.recall.routing.scale * sum(batch.recall.routing.losses.values()).detach()
    return loss


def base_model(plan: Plan, build: BuildContext) -> Transformer:
    """The dense model of a seed (``build.seed``), with the method's start for gists: the mean of all other embedding rows."""
    model = Transformer(plan.model(), build)
    train_stage(model, None, plan, None, plan.base, [build.seed, 0])
    first = plan.task.gist_ids
    with torch.no_grad():
        model.embedding.weight[first:] = model.embedding.weight[:first].mean(0)
    return model


def clone(model: Transformer) -> Transformer:
    """A model of its own with the same weights; process groups are shared."""
    copied = Transformer(model.config, dataclasses.replace(model.build, blank=True))
    copied.load_state_dict(model.state_dict())
    return copied


def dense_outcome(base: Transformer, plan: Plan) -> Outcome:
    """The dense arm: the base model goes on for as many steps as all others."""
    model, seed = clone(base), base.build.seed
    seconds = train_stage(model, None, plan, None, plan.forget, [seed, 1])
    seconds += train_stage(model, None, plan, None, plan.branch, [seed, 2], decay=True)
    return measure(model, DENSE, plan, None, seconds)


def gist_outcomes(base: Transformer, plan: Plan, chunk_sizes: tuple[int, ...], ways: Sequence[str]) -> Iterator[Outcome]:
    """Arms with these chunk sizes, one after another. Those that forget first share the model that has learned it."""
    seed, forgetting = base.build.seed, {}
    for name in ways:
        way = WAYS[name]
        gist = way.gist(chunk_sizes, plan.layers)
        none = dataclasses.replace(gist, recall="none")
        seconds = 0.0
        if way.from_start:
            model = clone(base)
            seconds = train_stage(model, way, plan, gist, plan.forget, [seed, 1])
        else:
            if gist.own_group not in forgetting:
                forgetting[gist.own_group] = clone(base)
                train_stage(forgetting[gist.own_group], way, plan, none, plan.forget, [seed, 1])
            model = clone(forgetting[gist.own_group])
        seconds += train_stage(model, way, plan, gist if way.recalls else none, plan.branch, [seed, 2], decay=True)
        yield measure(model, name, plan, gist if way.recalls else none, seconds)


@torch.no_grad()
def measure(model: Transformer, name: str, plan: Plan, gist: GistConfig | None, train_s: float) -> Outcome:
    """Accuracy on contexts that no stage has seen, as it was trained to read and, with gists, when nothing recalls."""
    one, two, loss, unfolded = answered(model, name, plan, gist)
    alone = one
    if gist is not None and gist.recall != "none":
        alone = answered(model, name, plan, dataclasses.replace(gist, recall="none"))[0]
    chunks = () if gist is None else gist.chunk_sizes
    return Outcome(model.build.seed, name, chunks, one, two, loss, alone, unfolded, train_s)


def answered(model: Transformer, name: str, plan: Plan, gist: GistConfig | None) -> tuple[float, float, float, float]:
    """``one_hop``, ``two_hop``, ``loss`` and ``unfolded`` of an outcome."""
    seed = model.build.seed
    samples, draw = np.random.default_rng([seed, 9]), torch.Generator().manual_seed(seed)
    one, two, loss, unfolded, count = [], [], 0.0, [], 0
    task = plan.task.scaled(plan.context)
    size = max(1, plan.batch * plan.task.context // plan.context)
    for _ in range(plan.evaluated // size):
        batch = task.batch(samples, size, gist)
        if gist is None:
            attend = dense_arm(batch)
        else:
            attend = gist_arm(WAYS[name], gist, batch, model.config.heads, model.config.kv_heads, draw)
        logits = model.head_logits(states(model, attend, batch)).transpose(0, 1)  # [B, T, vocab]
        right_one, right_two = task.score(batch, logits.argmax(-1))
        one.append(right_one)
        two.append(right_two)
        asked = batch.labels != IGNORED
        loss += torch.nn.functional.cross_entropy(logits[asked], batch.labels[asked], reduction="sum").item()
        count += int(asked.sum())
        if batch.recall:
            unfolded += [stats.unfolded.item() for stats in batch.recall.stats.values()]
    mean = lambda parts: torch.cat(parts).float().mean().item()
    return mean(one), mean(two), loss / count, sum(unfolded) / len(unfolded) if unfolded else 0.0
