"""Which samples the stages of a run read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from unfold.pretrain.config import RunConfig
from unfold.pretrain.data.blend import Stretch


def stretches_of(config: RunConfig, number: Callable[[int], int] = lambda index: index) -> list[Stretch]:
    """The samples that each stage of a run reads. number: the n-th sample trained on -> which it is.

    A stage's begin after the last one that the stage before it was trained on, so what is left out there moves it.
    """
    stages, train = config.stages, config.train
    begin_after = lambda samples: number(samples - 1) + 1 if samples else 0
    found = [
        Stretch(
            begin_after(stage.samples), stage.steps * stage.config.train.global_batch, stage.config.data.raw_tokens, stage.weights
        )
        for stage in stages
    ]
    if train.stages and train.stages[-1].until == train.steps:  # what comes after it if train.steps should be raised
        rest = Stretch(begin_after(stages[-1].samples_after(train.steps)), None, config.data.raw_tokens)
        return [*found, rest]
    return [*found[:-1], replace(found[-1], planned=None)]
