"""Runs what is not there yet, then writes table, plot and figures."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.benchmarks.recall_claim.report import write_report
from tests.benchmarks.recall_claim.training import Outcome, Plan, base_model, dense_outcome, gist_outcomes
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer
from unfold.pretrain import parallel
from unfold.pretrain.config import ParallelConfig
from unfold.pretrain.errors import UserError

CHUNK_SIZES = {  # by levels of gists and compression ratio
    "flat": {8: (8,), 16: (16,), 32: (32,)},
    "hierarchical": {8: (4, 2), 16: (4, 4), 32: (8, 4)},
}


def recall_claim(args: Namespace) -> Iterator[str]:
    """Train, measure and report; yields lines to print. A run that was cut off goes on where it was.

    Raises:
        UserError: results in --output were made with other settings, or there are none to report.
    """
    if not 0 < args.train_steps < float("inf"):
        raise UserError(f"--train-steps {args.train_steps}: is no factor above 0, such as 0.1 or 3")
    plan = scaled(Plan(), args.train_steps)
    results = Results(args.output, plan)
    if not args.report_only:
        groups = parallel.initialize(ParallelConfig())
        for seed in args.seeds:
            build = BuildContext(groups.tensor_group, seed)
            yield from _run_seed(results, plan, build, [CHUNK_SIZES[kind][ratio] for kind in args.gists for ratio in args.ratios])
    outcomes = results.read()
    if not outcomes:
        raise UserError(f"--output {args.output}: holds no results; run without --report-only")
    yield from write_report(args.output, outcomes, plan)


def scaled(plan: Plan, factor: float) -> Plan:
    """A plan with so many times the steps."""
    scale = lambda stage: tuple((part, max(1, round(steps * factor))) for part, steps in stage)
    return dataclasses.replace(plan, base=scale(plan.base), forget=scale(plan.forget), branch=scale(plan.branch))


def _run_seed(results: Results, plan: Plan, build: BuildContext, sizes: list[tuple[int, ...]]) -> Iterator[str]:
    """The dense arm and these structures, of one seed."""
    if results.has(build.seed, ()) and all(results.has(build.seed, size) for size in sizes):
        return
    base = results.base(plan, build)
    if not results.has(build.seed, ()):
        yield from results.add([dense_outcome(base, plan)])
    for size in sizes:
        if not results.has(build.seed, size):
            yield from results.add(gist_outcomes(base, plan, size))


class Results:
    """One file per seed and chunk sizes, with the settings that they were made with."""

    def __init__(self, directory: Path, plan: Plan):
        self._runs = directory / "runs"
        self._plan = json.loads(json.dumps(dataclasses.asdict(plan)))
        self._runs.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._runs.glob("*.json")):
            if json.loads(path.read_text())["plan"] != self._plan:
                raise UserError(f"{path}: was made with other settings; take another --output, or the same --train-steps")

    def _path(self, seed: int, chunk_sizes: tuple[int, ...]) -> Path:
        return self._runs / f"seed{seed}-{'x'.join(map(str, chunk_sizes)) or 'dense'}.json"

    def has(self, seed: int, chunk_sizes: tuple[int, ...]) -> bool:
        """Whether these arms were run."""
        return self._path(seed, chunk_sizes).exists()

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

    def add(self, outcomes: list[Outcome]) -> Iterator[str]:
        """Keep the outcomes of one structure; yields a line for each."""
        first = outcomes[0]
        path = self._path(first.seed, first.chunk_sizes)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"plan": self._plan, "outcomes": [o.to_dict() for o in outcomes]}, indent=1) + "\n")
        part.rename(path)
        for o in outcomes:
            yield (
                f"seed {o.seed} chunks {list(o.chunk_sizes) or '-'} {o.arm:6} one hop {o.one_hop:.3f} two hops {o.two_hop:.3f} "
                f"unfolded {o.unfolded:.0f} ({o.train_s:.0f} s)"
            )

    def read(self) -> list[Outcome]:
        """All outcomes that there are."""
        found = []
        for path in sorted(self._runs.glob("*.json")):
            for entry in json.loads(path.read_text())["outcomes"]:
                found.append(Outcome(**{**entry, "chunk_sizes": tuple(entry["chunk_sizes"])}))
        return found
