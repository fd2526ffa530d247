"""Runs what is not there yet, then writes table, plot and figures."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.benchmarks.recall_claim.arms import DENSE
from tests.benchmarks.recall_claim.report import write_report
from tests.benchmarks.recall_claim.training import Outcome, Plan, base_model, dense_outcome, gist_outcomes
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer
from unfold.pretrain import parallel
from unfold.pretrain.config import ParallelConfig
from unfold.pretrain.errors import UserError

CHUNK_SIZES = ((8,), (4, 2), (16,), (4, 4), (32,), (8, 4), (8, 2, 2))
# Steps on contexts longer than the task's, which follow all others, by their length.
LONGER = {256: (), 1024: ((1024, 100),), 4096: ((1024, 100), (4096, 60))}


def recall_claim(args: Namespace) -> Iterator[str]:
    """Train, measure and report; yields lines to print. A run that was cut off goes on where it was.

    Raises:
        UserError: results in --output were made with other settings, or there are none to report.
    """
    if not 0 < args.train_steps < float("inf"):
        raise UserError(f"--train-steps {args.train_steps}: is no factor above 0, such as 0.1 or 3")
    plan = made_longer(scaled(Plan(), args.train_steps), args.context)
    results = Results(args.output, plan)
    if not args.report_only:
        groups = parallel.initialize(ParallelConfig())
        for seed in args.seeds:
            build = BuildContext(groups.tensor_group, seed)
            yield from _run_seed(results, plan, build, args.chunk_sizes, args.ways)
    outcomes = results.read()
    if not outcomes:
        raise UserError(f"--output {args.output}: holds no results; run without --report-only")
    yield from write_report(args.output, outcomes, plan)


def scaled(plan: Plan, factor: float) -> Plan:
    """A plan with so many times the steps."""
    scale = lambda stage: tuple((part, max(1, round(steps * factor))) for part, steps in stage)
    return dataclasses.replace(plan, base=scale(plan.base), forget=scale(plan.forget), branch=scale(plan.branch))


def made_longer(plan: Plan, context: int) -> Plan:
    """A plan that goes on with longer contexts, and measures on these."""
    more = LONGER[context]
    evaluated = plan.evaluated * 256 // context if context > 256 else plan.evaluated
    return dataclasses.replace(plan, branch=(*plan.branch, *more), context=context, evaluated=max(32, evaluated))


def _run_seed(
    results: Results, plan: Plan, build: BuildContext, structures: Sequence[tuple[int, ...]], ways: Sequence[str]
) -> Iterator[str]:
    """The dense arm and these structures and ways, of one seed."""
    wanted = {sizes: [way for way in ways if not results.has(build.seed, sizes, way)] for sizes in structures}
    if results.has(build.seed, (), DENSE) and not any(wanted.values()):
        return
    base = results.base(plan, build)
    if not results.has(build.seed, (), DENSE):
        yield results.add(dense_outcome(base, plan))
    for sizes, missing in wanted.items():
        for outcome in gist_outcomes(base, plan, sizes, missing):
            yield results.add(outcome)


class Results:
    """One file per seed, chunk sizes and arm, with the settings that they were made with."""

    def __init__(self, directory: Path, plan: Plan):
        self._runs = directory / "runs"
        self._plan = json.loads(json.dumps(dataclasses.asdict(plan)))
        self._runs.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._runs.glob("*.json")):
            if json.loads(path.read_text())["plan"] != self._plan:
                raise UserError(f"{path}: was made with other settings; take another --output, or the same --train-steps")

    def _path(self, seed: int, chunk_sizes: tuple[int, ...], arm: str) -> Path:
        structure = f"{'x'.join(map(str, chunk_sizes))}-" if chunk_sizes else ""
        return self._runs / f"seed{seed}-{structure}{arm}.json"

    def has(self, seed: int, chunk_sizes: tuple[int, ...], arm: str) -> bool:
        """Whether an arm was run."""
        return self._path(seed, chunk_sizes, arm).exists()

    def base(self, plan: Plan, build: BuildContext) -> Transformer:
        """The dense model that a seed's arms start from; trained once and kept."""
        path = self._runs / f"seed{build.seed}-base.pt"
        if path.exists():
            model = Transformer(plan.model(), build)
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        model = base_model(plan, build)
        weights = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        torch.save(weights, path)
        return model

    def add(self, outcome: Outcome) -> str:
        """Keep an outcome; returns a line on it."""
        o = outcome
        path = self._path(o.seed, o.chunk_sizes, o.arm)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"plan": self._plan, "outcome": o.to_dict()}, indent=1) + "\n")
        part.rename(path)
        return (
            f"seed {o.seed} chunks {list(o.chunk_sizes) or '-'} {o.arm:12} one hop {o.one_hop:.3f} two hops {o.two_hop:.3f} "
            f"alone {o.alone:.3f} unfolded {o.unfolded:.0f} ({o.train_s:.0f} s)"
        )

    def read(self) -> list[Outcome]:
        """All outcomes that there are."""
        found = []
        for path in sorted(self._runs.glob("*.json")):
            entry = json.loads(path.read_text())["outcome"]
            found.append(Outcome(**{**entry, "chunk_sizes": tuple(entry["chunk_sizes"])}))
        return found
