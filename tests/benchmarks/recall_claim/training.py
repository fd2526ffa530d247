"""One model through its stages: look-ups with dense attention, then forgetting, then each way of going on.

Every arm takes the same number of steps on the same samples; only who sees whom differs. Starting from a dense model is what
the method is made for (continued pretraining), and lets all arms of a seed share their first stage.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import torch

from tests.benchmarks.recall_claim.arms import BRANCHES, DENSE, GISTS, hidden, loss_sum
from tests.benchmarks.recall_claim.task import LookupTask
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer
from unfold.model.visibility import IGNORED

# (n, steps): so many steps on contexts of 1/n of the length, n times as many of them in a batch. Short contexts come first:
# look-ups are learned far faster there, by every arm.
Stage = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """How long the stages are, and the size of the models.

    Attributes:
        base: dense, what all arms of a seed start from.
        forget: with gists and without recall; the dense arm stays dense.
        branch: each arm by itself.
        batch: whole contexts per step.
        evaluated: contexts that accuracy is measured on, the same for all arms, never trained on.
    """

    base: Stage = ((8, 350), (4, 150), (1, 100))
    forget: Stage = ((8, 150), (4, 150), (1, 150))
    branch: Stage = ((4, 100), (1, 250))
    batch: int = 8
    evaluated: int = 128
    lr: float = 3e-3
    matrix_lr: float = 0.005
    layers: int = 3
    hidden_size: int = 64
    heads: int = 1
    task: LookupTask = LookupTask()

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
        unfolded: raw tokens that a question unfolded, a mean over layers; 0 where nothing recalls.
        train_s: seconds of the arm's last stage.
    """

    seed: int
    arm: str
    chunk_sizes: tuple[int, ...]
    one_hop: float
    two_hop: float
    loss: float
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
    model: Transformer, arm: str, plan: Plan, gist: GistConfig | None, stage: Stage, key: list[int], decay: bool = False
) -> float:
    """Train in place; returns the seconds it took. key: what the samples are drawn from, the same for all arms of a stage."""
    began = time.monotonic()
    samples = np.random.default_rng(key)
    draw = torch.Generator().manual_seed(sum(key))
    optimizer = Optimizer(model, plan, sum(steps for _, steps in stage), decay)
    for part, steps in stage:
        task = plan.task.scaled(plan.task.context // part)
        for _ in range(steps):
            batch = task.batch(samples, plan.batch * part, gist)
            loss = loss_sum(model, arm, batch, draw) / (batch.labels != IGNORED).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return time.monotonic() - began


def base_model(plan: Plan, build: BuildContext) -> Transformer:
    """The dense model of a seed (``build.seed``), with the method's start for gists: the mean of all other embedding rows."""
    model = Transformer(plan.model(), build)
    train_stage(model, DENSE, plan, None, plan.base, [build.seed, 0])
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
    train_stage(model, DENSE, plan, None, plan.forget, [seed, 1])
    seconds = train_stage(model, DENSE, plan, None, plan.branch, [seed, 2], decay=True)
    return measure(model, DENSE, plan, None, seconds)


def gist_outcomes(base: Transformer, plan: Plan, chunk_sizes: tuple[int, ...]) -> list[Outcome]:
    """All arms with these chunk sizes, from one model that has learned to forget."""
    gist, seed = GistConfig(chunk_sizes, recall="suffix"), base.build.seed
    forgetting = clone(base)
    train_stage(forgetting, GISTS, plan, gist, plan.forget, [seed, 1])
    outcomes = []
    for arm in BRANCHES:
        model = clone(forgetting)
        seconds = train_stage(model, arm, plan, gist, plan.branch, [seed, 2], decay=True)
        outcomes.append(measure(model, arm, plan, gist, seconds))
    return outcomes


@torch.no_grad()
def measure(model: Transformer, arm: str, plan: Plan, gist: GistConfig | None, train_s: float) -> Outcome:
    """Accuracy on contexts that no stage has seen."""
    seed = model.build.seed
    samples, draw = np.random.default_rng([seed, 9]), torch.Generator().manual_seed(seed)
    one, two, loss, unfolded, count = [], [], 0.0, [], 0
    for _ in range(plan.evaluated // plan.batch):
        batch = plan.task.batch(samples, plan.batch, gist)
        logits = model.head_logits(hidden(model, arm, batch, draw)).transpose(0, 1)  # [B, T, vocab]
        right_one, right_two = plan.task.score(batch, logits.argmax(-1))
        one.append(right_one)
        two.append(right_two)
        asked = batch.labels != IGNORED
        loss += torch.nn.functional.cross_entropy(logits[asked], batch.labels[asked], reduction="sum").item()
        count += int(asked.sum())
        if batch.recall:
            unfolded += [stats.unfolded.item() for stats in batch.recall.stats.values()]
    mean = lambda parts: torch.cat(parts).float().mean().item()
    read = sum(unfolded) / len(unfolded) if unfolded else 0.0
    chunks = () if gist is None else gist.chunk_sizes
    return Outcome(seed, arm, chunks, mean(one), mean(two), loss / count, read, train_s)
