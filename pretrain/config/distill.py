"""What of the configuration says how a model learns from its own dense attention."""

from __future__ import annotations

from dataclasses import dataclass

from unfold.model.settings import Count, NotNegative, Settings, option


@dataclass(frozen=True)
class DistillConfig(Settings):
    """Learning from dense attention: what the model would do if raw tokens saw all raw tokens, its weights as they are."""

    logits: NotNegative = option(
        0.0, "weight of the KL divergence of next-token distributions from those under dense attention; 0: none"
    )
    hidden: NotNegative = option(
        0.0, "weight of the smooth-L1 between every layer's output at raw tokens and that under dense attention; 0: none"
    )
    every: Count = option(
        1, "only samples whose global number is a multiple of it learn so; a micro-batch without one costs nothing more"
    )

    @property
    def active(self) -> bool:
        """Whether anything is learned so."""
        return self.logits > 0 or self.hidden > 0

    def misplaced(self, attention: str, stages: int) -> list[str]:
        """Why a model with this attention in so many pipeline stages cannot; each text begins with a setting's name."""
        errors = []
        for name in ("logits", "hidden"):
            weight = getattr(self, name)
            if weight and attention == "dense":
                errors.append(f"distill.{name}: {weight} with model.attention: dense, which has nothing to learn so; set it to 0")
            if weight and stages > 1:
                errors.append(
                    f"distill.{name}: {weight} with parallel.pipeline: {stages}; a stage has no whole model to learn from, "
                    f"set parallel.pipeline=1 or distill.{name}=0"
                )
        return errors
