"""Runs what is not there yet, then writes table, plot and figures."""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.kept import Kept
from tests.benchmarks.quotes.data import make_data
from tests.benchmarks.quotes.report import Outcome, write_report
from tests.benchmarks.quotes.training import (
    Plan,
    base_model,
    dense_config,
    longer_model,
    readings,
    started_from,
    train,
    way_config,
)
from tests.benchmarks.quotes.ways import ways_of
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer
from unfold.pretrain import parallel
from unfold.pretrain.config import ParallelConfig
from unfold.pretrain.config.yaml_text import parse_value
from unfold.pretrain.errors import UserError
from unfold.pretrain.parallel import Parallel

LONGEST = 4096  # raw tokens of a sample
SECTIONS = ("model", "gist", "distill")  # whose settings --set takes


def quotes(args: Namespace) -> Iterator[str]:
    """Train, measure and report; yields lines to print. A run that was cut off goes on with the way that it was at.

    Raises:
        UserError: results in --output were made with other settings, or there are none to report.
    """
    if not 0 < args.train_steps < float("inf"):
        raise UserError(f"--train-steps {args.train_steps}: is no factor above 0, such as 0.1 or 3")
    if args.hidden_size < 1 or args.heads < 1 or args.hidden_size % (2 * args.heads):
        size = f"--hidden-size {args.hidden_size} --heads {args.heads}"
        raise UserError(f"{size}: the width must be a multiple of twice the heads, as 128 and 2")
    if args.raw_tokens % 64 or not 128 <= args.raw_tokens <= 1024:
        raise UserError(f"--raw-tokens {args.raw_tokens}: must be a multiple of 64 from 128 to 1024, the tokens of a step")
    rising = all(a < b for a, b in zip([args.raw_tokens, *args.lengths], args.lengths))
    if not rising or any(length % 64 or length > LONGEST for length in args.lengths) or args.length_steps < 1:
        told = f"--lengths {' '.join(map(str, args.lengths))} --length-steps {args.length_steps}"
        lengths = f"rising multiples of 64 above --raw-tokens ({args.raw_tokens}), {LONGEST} at most, for a step or more each"
        raise UserError(f"{told}: must be {lengths}, as 512 1024 and 150")
    plan = Plan(
        copies=args.copies,
        quoting=dataclasses.replace(Plan.quoting, raw_tokens=args.raw_tokens),
        lengths=tuple(args.lengths),
        length_steps=args.length_steps,
        settings=tuple(map(setting, args.settings)),
    )
    plan = scaled(sized(plan, args.hidden_size, args.heads), args.train_steps)
    results = Results(args.output, plan)
    if not args.report_only:
        yield from run(results, plan, args)
    outcomes = results.outcomes()
    if not outcomes:
        raise UserError(f"--output {args.output}: holds no results; run without --report-only")
    yield from write_report(args.output, outcomes, plan)


def setting(text: str) -> tuple[str, Any]:
    """(dotted key, value) of KEY=VALUE. Raises UserError where it is none, or of another section than SECTIONS."""
    key, _, value = text.partition("=")
    section, _, name = key.partition(".")
    if section not in SECTIONS or not name or not value:
        raise UserError(f"--set {text}: expected KEY=VALUE with a key of {', '.join(SECTIONS)}, e.g. --set gist.route_loss=2")
    try:
        return key, parse_value(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: {value!r} is not a YAML value; quote it") from None


def sized(plan: Plan, hidden_size: int, heads: int) -> Plan:
    """A plan for models of another size; wide matrices take a smaller rate."""
    rate = plan.matrix_lr * plan.hidden_size / hidden_size
    return dataclasses.replace(plan, hidden_size=hidden_size, heads=heads, kv_heads=heads, matrix_lr=rate)


def scaled(plan: Plan, factor: float) -> Plan:
    """A plan with so many times the steps."""
    times = lambda steps: max(1, round(steps * factor))
    return dataclasses.replace(
        plan,
        short_steps=times(plan.short_steps),
        base_steps=times(plan.base_steps),
        length_steps=times(plan.length_steps),
        steps=times(plan.steps),
    )


def run(results: Results, plan: Plan, args: Namespace) -> Iterator[str]:
    """All ways of all seeds that are not there yet; yields a line on each."""
    groups = parallel.initialize(ParallelConfig())
    tokens = plan.documents * plan.short.raw_tokens
    longer = {name: (quoting, tokens // quoting.raw_tokens) for name, quoting in plan.stages}
    quotings = {"short": (plan.short, plan.documents), **longer}
    make_data(results.data, plan.vocab_size, quotings, plan.evaluated, args.text)
    for seed in args.seeds:
        missing = [name for name in args.ways if not results.has(seed, args.chunk_sizes, name)]
        if not missing:
            continue
        base = results.base_model(plan, groups, BuildContext(groups.tensor_group, seed))
        for name in missing:
            way = ways_of(args.chunk_sizes)[name]
            config = way_config(plan, results.data, way, args.chunk_sizes, seed)
            model, began = started_from(base, config), time.process_time()
            for _ in train(model, config, groups, plan, decay=True):
                pass
            read, covered = readings(model, config, plan, results.data)
            yield results.keep(
                Outcome(seed, name, args.chunk_sizes, config.train.steps, time.process_time() - began, read, covered)
            )


class Results(Kept):
    """Outcomes, data and dense models of the experiment."""

    def __init__(self, directory: Path, plan: Plan):
        super().__init__(directory, plan)
        self.data = directory / "data"

    def base_model(self, plan: Plan, groups: Parallel, build: BuildContext) -> Transformer:
        """The dense model that a seed's ways start from; trained once and kept."""
        empty = lambda: Transformer(dense_config(plan, self.data, build.seed).model, build)
        model = self.base(build.seed, empty, lambda: base_model(plan, self.data, groups, build))
        for stage, length in enumerate(plan.lengths, 1):
            longer = partial(longer_model, model, plan, self.data, groups, stage)
            model = self.base(build.seed, empty, longer, f"-{length}")
        return model

    def keep(self, outcome: Outcome) -> str:
        """Keep an outcome; returns a line on it."""
        o = outcome
        self.add(o.seed, o.chunk_sizes, o.way, o.to_dict())
        return (
            f"seed {o.seed} chunks {list(o.chunk_sizes)} {o.way:12} quoted {o.own.quote:.3f} plain {o.own.plain:.3f} "
            f"everything unfolded {o.read['everything'].quote:.3f} dense {o.read['dense'].quote:.3f} ({o.seconds:.0f} s)"
        )

    def outcomes(self) -> list[Outcome]:
        """All outcomes that there are."""
        return [Outcome.from_dict(entry) for entry in self.read()]
