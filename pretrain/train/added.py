"""What a step learns beside the next token: how much a micro-batch's terms weigh, and what they came to.

Every term is a mean over the global batch, as the cross-entropy is: of the squared log-partition over loss tokens, of the
divergence over the loss tokens of distilled samples, of the distance of hidden states over layers and over the elements of
these samples' raw tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import deepspeed
from torch import Tensor

from unfold.model.config import ModelConfig, sizes_name
from unfold.model.visibility import IGNORED, AddedLosses, MicroBatch
from unfold.pretrain.config import DistillConfig, RunConfig
from unfold.pretrain.parallel import Parallel

METRICS = {"z": "z_loss", "logits": "distill_logits", "hidden": "distill_hidden"}


@dataclass(frozen=True)
class Added:
    """The weights of a run's terms. Without any, a step does nothing that it would not do anyway.

    choices: names of the chunk sizes that samples may have drawn, whose cross-entropies are told apart.
    """

    z: float = 0.0
    distill: DistillConfig = DistillConfig()
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RunConfig) -> Added:
        """Those of a run, or of one of its stages."""
        choices = config.folding.choices if config.folding else ()
        return cls(config.train.z_loss, config.distill, tuple(sizes_name(choice.chunk_sizes) for choice in choices))

    def to_step(
        self,
        batches: Sequence[MicroBatch],
        engine: deepspeed.DeepSpeedEngine,
        parallel: Parallel,
        model: ModelConfig,
        tokens: float,
    ) -> tuple[Sequence[MicroBatch], dict[str, float]]:
        """A step's micro-batches with their terms, and what each term's sum over the global batch is to be divided by.

        tokens: loss tokens of the global batch.
        """
        if not self.z and not self.distill.active and not self.choices:
            return batches, {}
        divisors = {"z": tokens} if self.z else {}
        if self.distill.active:
            divisors |= _distilled_terms(batches, parallel, model, self.distill)
        relative = {name: tokens / count for name, count in divisors.items()}
        weights = {
            "z": self.z * relative.get("z", 0.0),
            "logits": self.distill.logits * relative.get("logits", 0.0),
            "hidden": self.distill.hidden * relative.get("hidden", 0.0),
        }
        taught = _taught(batches, engine, parallel)
        return [_with_terms(batch, weights, is_taught) for batch, is_taught in zip(batches, taught)], divisors

    def shares(self, batches: Sequence[MicroBatch], divisors: dict[str, float]) -> dict[str, float | Tensor]:
        """What this rank's micro-batches add to a step's metrics; tensor-parallel ranks have it alike."""
        sums = [batch.added.sums for batch in batches if batch.added]
        total = lambda name: sum(s[name].double() for s in sums if name in s)
        learned = {METRICS[name]: total(name) / divisor for name, divisor in divisors.items()}
        return learned | {name: total(name) for choice in self.choices for name in (f"loss.{choice}", f"tokens.{choice}")}

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """A step's metrics from the sums over all ranks of :meth:`shares`; chunk sizes that no sample drew have no loss."""
        losses = {f"loss.{c}": (totals.pop(f"loss.{c}"), totals.pop(f"tokens.{c}")) for c in self.choices}
        return totals | {name: loss / tokens for name, (loss, tokens) in losses.items() if tokens and math.isfinite(loss)}


NOTHING_ADDED = Added()


def _distilled_terms(
    batches: Sequence[MicroBatch], parallel: Parallel, model: ModelConfig, distill: DistillConfig
) -> dict[str, float]:
    """What divides the sums over distilled samples; nothing where the global batch has no token of them."""
    targets = raw = 0
    for batch in batches:
        chosen = list(batch.distilled)
        targets += int((batch.labels[chosen] != IGNORED).sum())
        raw += int(((batch.layout.level < 0) & (batch.layout.doc >= 0))[chosen].sum())
    counts = {
        "logits": parallel.sum_over_data(targets) if distill.logits else 0.0,
        "hidden": parallel.sum_over_data(raw) * model.hidden_size * model.layers if distill.hidden else 0.0,
    }
    return {name: count for name, count in counts.items() if count}


def _taught(batches: Sequence[MicroBatch], engine: deepspeed.DeepSpeedEngine, parallel: Parallel) -> list[bool]:
    """Whether each of this rank's micro-batches passes through the teacher.

    Under ZeRO-3 every layer's weights are gathered by all ranks: where one runs the teacher, the others keep it company.
    """
    own = [bool(batch.distilled) for batch in batches]
    return [parallel.sum_over_data(x) > 0 for x in own] if engine.zero_optimization_stage() == 3 else own


def _with_terms(batch: MicroBatch, weights: dict[str, float], taught: bool) -> MicroBatch:
    if not batch.distilled:  # its first sample keeps company, for nothing
        weights = weights | {"logits": 0.0, "hidden": 0.0}
    return replace(batch, added=AddedLosses(**weights, samples=(batch.distilled or (0,)) if taught else (), apart=batch.drawn))
