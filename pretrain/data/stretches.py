"""Which samples the stages of a run read."""

from __future__ import annotations

from collections.abc import Callable

from unfold.pretrain.config import RunConfig
from unfold.pretrain.data.blend import Stretch


def stretches_of(config: RunConfig, number: Callable[[int], int] = lambda index: index) -> list[Stretch]:
    """The samples that each stage of a run reads. number: the n-th sample trained on -> which it is.

    A stage's begin after the last one that the stage before it was trained on, so what is left out there moves it.
    """
    begins = [number(stage.samples - 1) + 1 if stage.samples else 0 for stage in config.stages]
    counts = [stage.steps * stage.config.train.global_batch for stage in config.stages[:-1]]
    return [
        Stretch(begin, planned, stage.config.data.raw_tokens, stage.weights)
        for begin, planned, stage in zip(begins, [*counts, None], config.stages, strict=True)
    ]
