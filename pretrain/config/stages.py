"""Stages of a run: settings that change at a step. One place decides what holds in a step: :meth:`RunConfig.at`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from unfold.model.config import RopeScaling
from unfold.model.settings import Bounds, Count, Natural, NotNegative, Part, Positive, Settings, SettingsError, option

BUDGETS = ("topk", "top_p", "budget_ratio")
# The section of a stage's settings; those of `gist` are not listed, and what is in none is of the stage itself.
SECTIONS = {
    "raw_tokens": "data", "packing": "data", "length_weights": "data", "global_batch": "train", "micro_batch": "train",
    "lr": "optimizer", "rope_theta": "model", "rope_scaling": "model", "max_position": "model",
}  # fmt: skip
OWN = ("until", "name", "warmup", "weights")


class Run(Protocol):
    """The sections of a run's configuration (:class:`unfold.pretrain.config.schema.RunConfig`) that stages change."""

    data: Any
    model: Any
    gist: Any
    train: Any
    optimizer: Any


@dataclass(frozen=True)
class StageConfig(Settings):
    """A part of the run, from the end of the stage before it (or the first step) on. What it does not set holds as elsewhere."""

    until: Count = option(1, "its last step; what comes after the last stage is as the other sections have it")
    name: str = option("", "what logs and metrics call it, beside its number")
    raw_tokens: Annotated[int, Bounds(ge=2)] | None = option(None, "data.raw_tokens in this stage")
    weights: tuple[NotNegative, ...] | None = option(
        None, "weights of the entries of data.train in this stage, in their order, in place of those that they have there"
    )
    packing: Literal["windows", "best_fit"] | None = option(None, "data.packing in this stage")
    length_weights: tuple[tuple[int, float], ...] | None = option(None, "data.length_weights in this stage; []: none")
    global_batch: Count | None = option(None, "train.global_batch in this stage")
    micro_batch: Count | None = option(None, "train.micro_batch in this stage; it may differ on resume")
    lr: Positive | None = option(None, "optimizer.lr in this stage: the schedule goes on over all steps, from this peak")
    warmup: Natural = option(0, "first steps of this stage in which the learning rate rises linearly from 0")
    rope_theta: Positive | None = option(None, "model.rope_theta in this stage")
    rope_scaling: RopeScaling | None = option(None, "model.rope_scaling in this stage, whole: what it lacks has its default")
    max_position: Count | None = option(None, "model.max_position in this stage and in exports of its checkpoints")
    recall: Literal["none", "suffix", "all"] | None = option(None, "gist.recall in this stage")
    topk: Count | None = option(None, "gist.topk in this stage, in place of any other budget")
    budget_ratio: Count | None = option(None, "gist.budget_ratio in this stage, in place of any other budget")
    top_p: Annotated[float, Bounds(gt=0, lt=1)] | None = option(None, "gist.top_p in this stage, in place of any other budget")
    unfold_all: bool | None = option(None, "gist.unfold_all in this stage")
    unfold_share: Part | None = option(None, "gist.unfold_share in this stage")
    forget_share: Part | None = option(None, "gist.forget_share in this stage")
    route_loss: NotNegative | None = option(None, "gist.route_loss in this stage")

    def __post_init__(self):
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
        if self.length_weights is not None:
            object.__setattr__(self, "length_weights", tuple(tuple(pair) for pair in self.length_weights))
        super().__post_init__()

    def misfits(self) -> list[str]:
        if any(weight < 0 for weight in self.weights or ()):
            return [f"weights: {list(self.weights)} has one below 0"]
        if self.weights is not None and not sum(self.weights):
            return [f"weights: {list(self.weights)} add up to nothing; give an entry of data.train a weight above 0"]
        return []

    def own(self) -> dict[str, Any]:
        """What it sets."""
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}

    def over(self, config: Run) -> Run:
        """The run's settings in this stage, without stages. Raises SettingsError where they do not go together."""
        own = self.own()
        sections: dict[str, dict] = {"train": {"stages": ()}}
        if own.keys() & set(BUDGETS):
            sections["gist"] = dict.fromkeys(BUDGETS)
        for name, value in own.items():
            if name not in OWN:
                sections.setdefault(SECTIONS.get(name, "gist"), {})[name] = value
        made = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
        return dataclasses.replace(config, **made)


@dataclass(frozen=True)
class RunStage:
    """Steps of a run in which the same settings hold.

    Attributes:
        number: counted from 1; what comes after the last of `train.stages` is the last one.
        name: the user's, or ''.
        first, last: its steps, counted from 1.
        samples, raw_tokens: trained on before it.
        config: what holds in it; without stages of its own.
        warmup: its first steps in which the learning rate rises.
        weights: of the entries of data.train; None: those that stand there.
        own: names of the settings that it sets itself.
    """

    number: int
    name: str
    first: int
    last: int
    samples: int
    raw_tokens: int
    config: Run
    warmup: int = 0
    weights: tuple[float, ...] | None = None
    own: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return self.last - self.first + 1

    @property
    def title(self) -> str:
        """For people: ``2 (long)``."""
        return f"{self.number} ({self.name})" if self.name else f"{self.number}"

    def place(self, setting: str) -> str:
        """Where a setting, such as ``train.micro_batch``, stands for this stage."""
        section, _, name = setting.partition(".")
        return f"train.stages.{self.number - 1}.{name}" if name in self.own and SECTIONS.get(name, "gist") == section else setting

    def samples_after(self, step: int) -> int:
        """Samples trained on after one of its steps, or after the last step before it."""
        return self.samples + (step + 1 - self.first) * self.config.train.global_batch

    def raw_tokens_after(self, step: int) -> int:
        """Their raw tokens, padding included."""
        return self.raw_tokens + (self.samples_after(step) - self.samples) * self.config.data.raw_tokens

    def record(self) -> dict:
        """What a checkpoint says of it: how its weights are to be read."""
        model = dataclasses.asdict(self.config.model)
        return {"number": self.number, "name": self.name, "model": {k: model[k] for k, v in SECTIONS.items() if v == "model"}}

    def labels(self) -> dict[str, int | str]:
        """What metrics say of it."""
        return {"stage": self.number} | ({"stage_name": self.name} if self.name else {})


def run_stages(config: Run) -> Iterator[RunStage]:
    """The stages of a configuration that has been checked; a run without any is one."""
    train = config.train
    if not train.stages:
        yield RunStage(1, "", 1, train.steps, 0, 0, config)
        return
    rest = StageConfig(until=train.steps)
    first, samples, tokens = 1, 0, 0
    for number, stage in enumerate((*train.stages, rest), 1):
        if first > stage.until:
            return  # the last one ends with the run
        there, own = stage.over(config), tuple(stage.own())
        made = RunStage(number, stage.name, first, stage.until, samples, tokens, there, stage.warmup, stage.weights, own)
        yield made
        first, samples, tokens = stage.until + 1, made.samples_after(stage.until), made.raw_tokens_after(stage.until)


def stage_errors(config: Run, known: list[str]) -> list[str]:
    """What is wrong with the stages of a run; each text begins with a setting's name. known: what is wrong without them."""
    errors, before, train = [], 0, config.train
    for number, stage in enumerate(train.stages):
        name = f"train.stages.{number}"
        if stage.until <= before:
            errors.append(f"{name}.until: {stage.until} is not after the stage before it, which ends with step {before}")
        if stage.until > train.steps:
            errors.append(f"{name}.until: {stage.until} is beyond train.steps ({train.steps})")
        if stage.warmup > max(0, stage.until - before):
            errors.append(f"{name}.warmup: {stage.warmup} is more than the {max(0, stage.until - before)} steps of the stage")
        entries = len(config.data.train)
        if stage.weights is not None and len(stage.weights) != entries:
            errors.append(
                f"{name}.weights: there are {len(stage.weights)} for {entries} entries of data.train; give one for each"
            )
        try:
            stage.over(config)
        except SettingsError as error:
            told = [text for text in error.errors if text not in known]
            errors += [f"{name}: {text}" if "." in text.partition(":")[0] else f"{name}.{text}" for text in told]
        before = stage.until
    return errors
