"""Which samples the stages of a run read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from unfold.pretrain.config import DataConfig, RunConfig
from unfold.pretrain.data.blend import Arranged, Stretch


def stretch_of(data: DataConfig, begin: int = 0) -> Stretch:
    """Samples to train on as these settings have them, from a global number on without end."""
    return Stretch(begin, None, data.raw_tokens, arranged=Arranged(data.packing, data.length_weights))


def stretches_of(config: RunConfig, number: Callable[[int], int] = lambda index: index) -> list[Stretch]:
    """The samples that each stage of a run reads. number: the n-th sample trained on -> which it is.

    A stage's begin after the last one that the stage before it was trained on, so what is left out there moves it.
    """
    stages, train = config.stages, config.train
    begin_after = lambda samples: number(samples - 1) + 1 if samples else 0
    found = [
        replace(
            stretch_of(stage.config.data, begin_after(stage.samples)),
            planned=stage.steps * stage.config.train.global_batch,
            weights=stage.weights,
        )
        for stage in stages
    ]
    if train.stages and train.stages[-1].until == train.steps:  # what comes after it if train.steps should be raised
        return [*found, stretch_of(config.data, begin_after(stages[-1].samples_after(train.steps)))]
    return [*found[:-1], replace(found[-1], planned=None)]
