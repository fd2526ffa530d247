"""Runs what is not there yet, then writes table, plot and figures."""

from __future__ import annotations

import dataclasses
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.benchmarks.quotes.data import make_data
from tests.benchmarks.quotes.report import Outcome, write_report
from tests.benchmarks.quotes.training import Plan, base_model, dense_config, readings, started_from, train, way_config
from tests.benchmarks.quotes.ways import ways_of
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer
from unfold.pretrain import parallel
from unfold.pretrain.config import ParallelConfig
from unfold.pretrain.errors import UserError
from unfold.pretrain.parallel import Parallel


def quotes(args: Namespace) -> Iterator[str]:
    """Train, measure and report; yields lines to print. A run that was cut off goes on with the way that it was at.

    Raises:
        UserError: results in --output were made with other settings, or there are none to report.
    """
    if not 0 < args.train_steps < float("inf"):
        raise UserError(f"--train-steps {args.train_steps}: is no factor above 0, such as 0.1 or 3")
    plan = scaled(Plan(), args.train_steps)
    results = Results(args.output, plan)
    if not args.report_only:
        yield from run(results, plan, args)
    outcomes = results.read()
    if not outcomes:
        raise UserError(f"--output {args.output}: holds no results; run without --report-only")
    yield from write_report(args.output, outcomes, plan)


def scaled(plan: Plan, factor: float) -> Plan:
    """A plan with so many times the steps."""
    times = lambda steps: max(1, round(steps * factor))
    return dataclasses.replace(
        plan, short_steps=times(plan.short_steps), base_steps=times(plan.base_steps), steps=times(plan.steps)
    )


def run(results: Results, plan: Plan, args: Namespace) -> Iterator[str]:
    """All ways of all seeds that are not there yet; yields a line on each."""
    groups = parallel.initialize(ParallelConfig())
    documents = plan.documents * plan.short.raw_tokens // plan.quoting.raw_tokens
    quotings = {"short": (plan.short, plan.documents), "quotes": (plan.quoting, documents)}
    make_data(results.data, plan.vocab_size, quotings, plan.evaluated, args.text)
    for seed in args.seeds:
        missing = [name for name in args.ways if not results.path(seed, args.chunk_sizes, name).exists()]
        if not missing:
            continue
        base = results.base(plan, groups, BuildContext(groups.tensor_group, seed))
        for name in missing:
            way = ways_of(args.chunk_sizes)[name]
            config = way_config(plan, results.data, way, args.chunk_sizes, seed)
            model, began = started_from(base, config), time.process_time()
            for _ in train(model, config, groups, plan, decay=True):
                pass
            read, covered = readings(model, config, plan, results.data)
            yield results.add(
                Outcome(seed, name, args.chunk_sizes, config.train.steps, time.process_time() - began, read, covered)
            )


class Results:
    """One file per seed, chunk sizes and way, with the settings that they were made with; data and dense models beside them."""

    def __init__(self, directory: Path, plan: Plan):
        self._runs, self.data = directory / "runs", directory / "data"
        self._plan = json.loads(json.dumps(dataclasses.asdict(plan)))
        self._runs.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._runs.glob("*.json")):
            if json.loads(path.read_text())["plan"] != self._plan:
                raise UserError(f"{path}: was made with other settings; take another --output, or the same --train-steps")

    def path(self, seed: int, chunk_sizes: tuple[int, ...], way: str) -> Path:
        """Where an outcome is kept."""
        return self._runs / f"seed{seed}-{'x'.join(map(str, chunk_sizes))}-{way}.json"

    def base(self, plan: Plan, groups: Parallel, build: BuildContext) -> Transformer:
        """The dense model that a seed's ways start from; trained once and kept."""
        path = self._runs / f"seed{build.seed}-base.pt"
        if path.exists():
            model = Transformer(dense_config(plan, self.data, build.seed).model, build)
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        model = base_model(plan, self.data, groups, build)
        weights = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        part = path.with_suffix(".part")
        torch.save(weights, part)
        part.rename(path)
        return model

    def add(self, outcome: Outcome) -> str:
        """Keep an outcome; returns a line on it."""
        o = outcome
        path = self.path(o.seed, o.chunk_sizes, o.way)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"plan": self._plan, "outcome": o.to_dict()}, indent=1) + "\n")
        part.rename(path)
        return (
            f"seed {o.seed} chunks {list(o.chunk_sizes)} {o.way:12} quoted {o.own.quote:.3f} plain {o.own.plain:.3f} "
            f"everything unfolded {o.read['everything'].quote:.3f} dense {o.read['dense'].quote:.3f} ({o.seconds:.0f} s)"
        )

    def read(self) -> list[Outcome]:
        """All outcomes that there are."""
        return [Outcome.from_dict(json.loads(path.read_text())["outcome"]) for path in sorted(self._runs.glob("*.json"))]
