"""Runs what is not there yet, then writes table, plot and figures."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator, Sequence

from tests.benchmarks.kept import Kept
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
LONGER = {256: (), 1024: ((1024, 200),), 4096: ((1024, 200), (4096, 400))}


def recall_claim(args: Namespace) -> Iterator[str]:
    """Train, measure and report; yields lines to print. A run that was cut off goes on where it was.

    Raises:
        UserError: results in --output were made with other settings, or there are none to report.
    """
    if not 0 < args.train_steps < float("inf"):
        raise UserError(f"--train-steps {args.train_steps}: is no factor above 0, such as 0.1 or 3")
    if args.layers < 2:
        raise UserError(f"--layers {args.layers}: recall begins at layer 1 or later, so a model has 2 layers or more")
    plan = made_longer(scaled(Plan(layers=args.layers), args.train_steps), args.context)
    results = Results(args.output, plan)
    if not args.report_only:
        groups = parallel.initialize(ParallelConfig())
        for seed in args.seeds:
            build = BuildContext(groups.tensor_group, seed)
            yield from _run_seed(results, plan, build, args.chunk_sizes, args.ways)
    outcomes = results.outcomes()
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
    base = results.base_model(plan, build)
    if not results.has(build.seed, (), DENSE):
        yield results.keep(dense_outcome(base, plan))
    for sizes, missing in wanted.items():
        for outcome in gist_outcomes(base, plan, sizes, missing):
            yield results.keep(outcome)


class Results(Kept):
    """Outcomes and dense models of the experiment."""

    def base_model(self, plan: Plan, build: BuildContext) -> Transformer:
        """The dense model that a seed's arms start from; trained once and kept."""
        return self.base(build.seed, lambda: Transformer(plan.model(), build), lambda: base_model(plan, build))

    def keep(self, outcome: Outcome) -> str:
        """Keep an outcome; returns a line on it."""
        o = outcome
        self.add(o.seed, o.chunk_sizes, o.arm, o.to_dict())
        return (
            f"seed {o.seed} chunks {list(o.chunk_sizes) or '-'} {o.arm:12} one hop {o.one_hop:.3f} two hops {o.two_hop:.3f} "
            f"alone {o.alone:.3f} unfolded {o.unfolded:.0f} ({o.train_s:.0f} s)"
        )

    def outcomes(self) -> list[Outcome]:
        """All outcomes that there are."""
        return [Outcome(**entry) for entry in self.read()]
