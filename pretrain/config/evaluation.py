"""What of the configuration says how a run is evaluated and exported while it goes on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from unfold.model.settings import Count, Natural, Settings, option

COMMANDS = ("perplexity", "passkey", "tasks", "routing")


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Evaluation and export while the run goes on: losses on held-out sources in the run itself, the rest beside it."""

    every: Natural = option(0, "steps between evaluations; 0: none")
    sources: tuple[str, ...] = option(
        (), "held-out shards, NAME=PREFIX, of which each gets a loss of its own; several entries of one name are one source"
    )
    samples: Count = option(16, "samples of each of these sources")
    commands: tuple[str, ...] = option(
        (),
        "sub-commands of `evaluate` with their flags, e.g. `passkey --lengths 512 --trials 2`, which processes of their own run "
        "on the checkpoint of the step",
    )
    export_every: Natural = option(0, "steps between exports into exports/ of the run directory, each proven; 0: none")
    threads: Count = option(2, "CPU threads of a process that evaluates or exports beside the run; it uses no GPU")

    def misfits(self) -> list[str]:
        errors = []
        for entry in self.sources:
            name, sign, prefix = entry.partition("=")
            if not (name and sign and prefix) or not name.replace("_", "").replace("-", "").isalnum():
                errors.append(f"sources: {entry!r} is not NAME=PREFIX, the name of letters, digits, - and _")
        for command in self.commands:
            try:
                words = shlex.split(command)
            except ValueError as error:
                errors.append(f"commands: {command!r} cannot be read ({error})")
                continue
            if not words or words[0] not in COMMANDS:
                errors.append(f"commands: {command!r} does not begin with one of {', '.join(COMMANDS)}")
            if taken := [word for word in words if word.split("=")[0] in ("--run-dir", "--model", "--step", "--output")]:
                errors.append(f"commands: {command!r} gives {taken[0]}, which the run gives itself")
        if (self.sources or self.commands) and not self.every:
            errors.append("every: 0 with sources or commands; set the steps between evaluations")
        return errors

    @property
    def by_name(self) -> dict[str, tuple[str, ...]]:
        """The prefixes of each source."""
        found: dict[str, tuple[str, ...]] = {}
        for entry in self.sources:
            name, _, prefix = entry.partition("=")
            found[name] = (*found.get(name, ()), prefix)
        return found
