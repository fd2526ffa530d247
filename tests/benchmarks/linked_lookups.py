"""Does linked training learn? Look-ups over documents that are read one by one and joined by links, beside reading all in place.

The task and the models are those of ``tests.benchmarks.recall_claim``: facts and links strewn into filler, then questions, of one
hop or two. Here the context is cut into documents, so that most questions of two hops need a fact of one document and a link of
another, which do not see each other. One model is trained linked from the dense base of its seed; it answers linked, with recall
and by gists alone, and, the same weights, over the same samples read in place as one context. ::

    python -m tests.benchmarks.linked_lookups --output DIR [--seed 0] [--chunk-sizes 8] [--train-steps 1.0]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.recall_claim.arms import RECIPE, WAYS
from tests.benchmarks.recall_claim.command import Results, scaled
from tests.benchmarks.recall_claim.task import LookupTask
from tests.benchmarks.recall_claim.training import Plan, answered, clone, train_stage
from unfold.model.gist import Bundle, GistConfig, Recall, build_layout, interleave
from unfold.model.gist.recall import RECALLS, ROUTES, UNFOLDS_ALL
from unfold.model.layers import BuildContext
from unfold.model.visibility import IGNORED, MicroBatch

LINKS = 5


@dataclass(frozen=True)
class LinkedLookups(LookupTask):
    """Look-ups whose context is documents.

    Attributes:
        document: tokens of each; 0: the context is read in place, as one. A shorter context is one document.
    """

    document: int = 0

    @property
    def vocab_size(self) -> int:
        """Four gists, and the links behind them."""
        return super().vocab_size + LINKS

    @property
    def part_links(self) -> range:
        """Ids of one document's links."""
        return range(self.vocab_size - LINKS, self.vocab_size)

    def scaled(self, context: int) -> LinkedLookups:
        return LinkedLookups(*dataclasses.astuple(super().scaled(context)), document=self.document)

    def batch(self, draw: np.random.Generator, size: int, gist: GistConfig | None) -> MicroBatch:
        """As :meth:`LookupTask.batch`, each sample a bundle; without gists, or documents, all in place."""
        if gist is None or not self.document:
            return super().batch(draw, size, gist)
        length = min(self.document, self.context)
        bundle = Bundle(0, (length,) * (self.context // length))
        rows = []
        for _ in range(size):
            context, asked, answers = self.sample(draw)
            raw = np.append(context, asked)
            gists = range(self.gist_ids, self.gist_ids + gist.levels)
            starts = np.ones(self.vocab_size, bool)
            made = interleave(raw, [len(raw)], starts, gist, gists, bundles=[bundle], link_ids=self.part_links)
            labels = np.full(len(made.ids), IGNORED)
            labels[-len(answers) :] = answers
            rows.append((made.ids, made.level, made.role, made.part, labels))
        ids, level, role, part, labels = (torch.from_numpy(np.stack(column)) for column in zip(*rows))
        layout = build_layout(level, torch.zeros_like(level), gist, role, part)
        if gist.recall == "none":
            return MicroBatch(ids, labels, layout)
        flags = torch.zeros_like(level)
        flags[:, -self.questions :] = RECALLS | UNFOLDS_ALL * gist.unfold_all | ROUTES * (gist.route_loss > 0)
        return MicroBatch(ids, labels, layout, Recall.from_flags(layout, gist, flags))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the base model and the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk-sizes", default="8", metavar="C,..")
    parser.add_argument("--document", type=int, default=32, metavar="N", help="tokens of a document (32)")
    parser.add_argument("--train-steps", type=float, default=1.0, metavar="X", help="times as many steps")
    args = parser.parse_args()
    from unfold.pretrain import parallel
    from unfold.pretrain.config import ParallelConfig

    args.output.mkdir(parents=True, exist_ok=True)
    sizes = tuple(map(int, args.chunk_sizes.split(",")))
    plan = dataclasses.replace(scaled(Plan(), args.train_steps), task=LinkedLookups(document=args.document))
    build = BuildContext(parallel.initialize(ParallelConfig()).tensor_group, args.seed)
    results = []
    for result in run_arms(plan, build, sizes, args.output):
        results.append(result)
        print(json.dumps(result), flush=True)
    (args.output / f"linked-{args.seed}-{args.chunk_sizes}.json").write_text(json.dumps(results, indent=1) + "\n")
    for line in table(results):
        print(line)


def run_arms(plan: Plan, build: BuildContext, sizes: tuple[int, ...], directory: Path) -> Iterator[dict]:
    """Train and measure; yields an entry per way of reading."""
    base = Results(directory, plan).base(plan, build)
    in_place = dataclasses.replace(plan, task=dataclasses.replace(plan.task, document=0))
    yield entry("dense, before linked training", "in place", answered(base, "", in_place, None))
    gist = RECIPE.gist(sizes, plan.layers)
    model = clone(base)
    seconds = train_stage(model, RECIPE, plan, gist, plan.forget, [build.seed, 1])
    seconds += train_stage(model, RECIPE, plan, gist, plan.branch, [build.seed, 2], decay=True)
    alone = dataclasses.replace(gist, recall="none")
    taught = next(name for name, way in WAYS.items() if way is RECIPE)
    for read, how in (("linked", plan), ("in place", in_place)):
        for name, config in (("recall", gist), ("gists alone", alone)):
            yield {**entry(f"trained linked, {name}", read, answered(model, taught, how, config)), "train_s": round(seconds)}
    yield entry("trained linked, dense", "in place", answered(model, "", in_place, None))


def entry(arm: str, read: str, outcome: tuple[float, float, float, float]) -> dict:
    """One line of the results; shares of questions that were answered rightly."""
    one, two, loss, unfolded = outcome
    return {"arm": arm, "read": read, "one_hop": one, "two_hop": two, "loss": loss, "unfolded": unfolded}


def table(results: list[dict]) -> Iterator[str]:
    """Lines in Markdown."""
    yield "| model | documents are read | one hop | two hops | raw tokens unfolded |"
    yield "|---|---|---|---|---|"
    for r in results:
        yield f"| {r['arm']} | {r['read']} | {r['one_hop']:.2f} | {r['two_hop']:.2f} | {r['unfolded']:.0f} |"


if __name__ == "__main__":
    main()
