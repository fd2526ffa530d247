"""Stages of a run: settings that change at a step. One place decides what holds in a step: :func:`gist_at`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from unfold.model.config import GistConfig
from unfold.model.settings import Bounds, Count, NotNegative, Part, Settings, SettingsError, option

BUDGETS = ("topk", "top_p", "budget_ratio")


@dataclass(frozen=True)
class StageConfig(Settings):
    """A part of the run, from the end of the stage before it (or the first step) on. What it does not set holds as in `gist`."""

    until: Count = option(1, "its last step; what comes after the last stage is as `gist` has it")
    recall: Literal["none", "suffix", "all"] | None = option(None, "gist.recall in this stage")
    topk: Count | None = option(None, "gist.topk in this stage, in place of any other budget")
    budget_ratio: Count | None = option(None, "gist.budget_ratio in this stage, in place of any other budget")
    top_p: Annotated[float, Bounds(gt=0, lt=1)] | None = option(None, "gist.top_p in this stage, in place of any other budget")
    unfold_all: bool | None = option(None, "gist.unfold_all in this stage")
    unfold_share: Part | None = option(None, "gist.unfold_share in this stage")
    forget_share: Part | None = option(None, "gist.forget_share in this stage")
    route_loss: NotNegative | None = option(None, "gist.route_loss in this stage")

    def over(self, gist: GistConfig) -> GistConfig:
        """The settings of gists in this stage. Raises SettingsError where they do not go together."""
        own = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}
        del own["until"]
        if own.keys() & set(BUDGETS):
            own = dict.fromkeys(BUDGETS) | own
        return dataclasses.replace(gist, **own)


def stage_errors(stages: tuple[StageConfig, ...], gist: GistConfig, steps: int) -> list[str]:
    """What is wrong with the stages of a run; each text begins with a setting's name."""
    errors, before = [], 0
    for number, stage in enumerate(stages):
        name = f"train.stages.{number}"
        if stage.until <= before:
            errors.append(f"{name}.until: {stage.until} is not after the stage before it, which ends with step {before}")
        if stage.until > steps:
            errors.append(f"{name}.until: {stage.until} is beyond train.steps ({steps})")
        try:
            stage.over(gist)
        except SettingsError as error:
            errors += [f"{name}.{text}" for text in error.errors]
        before = stage.until
    return errors


def stage_at(stages: tuple[StageConfig, ...], step: int) -> StageConfig | None:
    """The stage of a step (counted from 1); None after the last one."""
    return next((stage for stage in stages if step <= stage.until), None)
