"""How weights are updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from unfold.model.settings import Decay, NotNegative, Positive, Settings, option
from unfold.pretrain.config.trained import RateConfig

# Beyond, what a moment decays by in a step is less than half of what its numbers differ by, and it would hardly fall.
LARGEST_DECAY = 0.99


class Parallel(Protocol):
    """What is asked of :class:`unfold.pretrain.config.schema.ParallelConfig`."""

    tensor: int
    pipeline: int
    zero: int


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW, or Muon for the layers' matrices and AdamW for the rest. Norm weights are not decayed."""

    kind: Literal["adamw", "muon"] = option(
        "adamw", "adamw; muon: Muon for the layers' matrices, AdamW for embedding, head, norms and biases"
    )
    lr: Positive = option(3e-4, "peak learning rate")
    beta1: Decay = option(0.9, "decay of the first moment")
    beta2: Decay = option(0.95, "decay of the second moment")
    eps: Positive = option(1e-8, "added to the root of the second moment")
    weight_decay: NotNegative = option(0.1, "decoupled weight decay of matrices")
    muon_lr: Positive = option(0.02, "muon: peak learning rate of the layers' matrices; lr is that of the rest")
    muon_momentum: Decay = option(0.95, "muon: decay of the momentum")
    state: Literal["fp32", "bf16", "8bit"] = option(
        "fp32", "adamw: what its two moments are kept in between updates; updates and master weights are fp32"
    )
    rates: tuple[RateConfig, ...] = option(
        (), "learning rates of their own, e.g. [{match: gists, factor: 10}]; a parameter takes the first that matches it"
    )

    def misfits(self) -> list[str]:
        if self.state == "fp32":
            return []
        errors = []
        if self.kind == "muon":
            errors.append(
                f"state: {self.state} needs kind: adamw (DeepSpeed's Muon keeps its momentum in fp32); or set state: fp32"
            )
        for name in ("beta1", "beta2"):
            if (decay := getattr(self, name)) > LARGEST_DECAY:
                errors.append(
                    f"{name}: {decay} decays a moment by less than state: {self.state} can tell apart, and it would never fall; "
                    f"at most {LARGEST_DECAY} would do, or state: fp32"
                )
        return errors

    def misplaced(self, parallel: Parallel, precision: str, lora_rank: int) -> list[str]:
        """Why Muon, which needs whole matrices, cannot run as the rest is configured."""
        if self.kind != "muon":
            return []
        reasons = []
        if parallel.tensor > 1:
            reasons.append("parallel.tensor: 1 (tensor-parallel ranks hold parts of a matrix, Muon orthogonalises whole ones)")
        if parallel.pipeline > 1:
            reasons.append("parallel.pipeline: 1 (DeepSpeed refuses Muon where ranks hold different layers)")
        if parallel.zero != 1:
            reasons.append("parallel.zero: 1 (in other stages DeepSpeed clips what Muon has orthogonalised)")
        if precision != "bf16":
            reasons.append("precision: bf16 (in fp32 DeepSpeed clips what Muon has orthogonalised)")
        if lora_rank:
            reasons.append("lora.rank: 0 (an adapter is a product of two matrices, neither of which is to be orthogonal)")
        return [f"optimizer.kind: muon needs {reason}; set it, or kind: adamw" for reason in reasons]
