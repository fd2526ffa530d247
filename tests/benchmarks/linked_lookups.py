"""Does linked training learn? Look-ups over documents that are read one by one and joined by links, beside reading all in place.

The task and the models are those of ``tests.benchmarks.recall_claim``: facts and links strewn into filler, then questions, of one
hop or two. Here the context is cut into documents, so that most questions of two hops need a fact of one document and a link of
another, which do not see each other. From the dense model of a seed one model is trained linked and taught to route, one linked
in the paper's way, and one in place; each answers linked, with recall and by gists alone, and over the same samples read in
place as one context. ::

    python -m tests.benchmarks.linked_lookups --output DIR [--seeds 0 1 2] [--chunk-sizes 8 16 4,4]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.recall_claim.arms import WAYS
from tests.benchmarks.recall_claim.command import Results, scaled
from tests.benchmarks.recall_claim.task import LookupTask
from tests.benchmarks.recall_claim.training import Plan, answered, clone, train_stage
from unfold.model.decode.generation import Decoder
from unfold.model.gist import Bundle, GistConfig, Recall, Role, build_layout, interleave
from unfold.model.gist.recall import RECALLS, ROUTES, UNFOLDS_ALL
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer
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
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for figures; goes on where it was")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--chunk-sizes", nargs="+", default=["8"], metavar="C,..")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--document", type=int, default=32, metavar="N", help="tokens of a document (32)")
    parser.add_argument("--train-steps", type=float, default=1.0, metavar="X", help="times as many steps")
    args = parser.parse_args()
    from unfold.pretrain import parallel
    from unfold.pretrain.config import ParallelConfig

    plan = dataclasses.replace(scaled(Plan(), args.train_steps), task=LinkedLookups(document=args.document))
    kept, group = Results(args.output, plan), parallel.initialize(ParallelConfig()).tensor_group
    for seed in args.seeds:
        for text in args.chunk_sizes:
            for arm in args.arms:
                path = args.output / f"seed{seed}-{text.replace(',', 'x')}-{arm.replace(' ', '-')}.json"
                if not path.exists():
                    build, sizes = BuildContext(group, seed), tuple(map(int, text.split(",")))
                    path.write_text(json.dumps(run_arm(plan, kept.base(plan, build), sizes, arm), indent=1) + "\n")
    for line in table(args.output):
        print(line)


# What is trained: on documents or in place, and the way.
ARMS = {
    "linked": (True, "taught"),
    "linked paper": (True, "recall"),
    "in place": (False, "taught"),
}


def run_arm(plan: Plan, base: Transformer, sizes: tuple[int, ...], arm: str) -> dict:
    """Train one model, and measure it in each way of reading: shares of questions that were answered rightly."""
    linked, name = ARMS[arm]
    way, seed = WAYS[name], base.build.seed
    in_place = dataclasses.replace(plan, task=dataclasses.replace(plan.task, document=0))
    trained, gist = (plan if linked else in_place), way.gist(sizes, plan.layers)
    alone = dataclasses.replace(gist, recall="none")
    model = clone(base)
    seconds = train_stage(model, way, trained, gist if way.from_start else alone, plan.forget, [seed, 1])
    seconds += train_stage(model, way, trained, gist, plan.branch, [seed, 2], decay=True)
    # Last the way of generation: documents are read once and joined, the questions come token by token.
    readings = {
        "linked, recall": answered(model, name, plan, gist),
        "linked, gists alone": answered(model, name, plan, alone),
        "in place, recall": answered(model, name, in_place, gist),
        "in place, dense": answered(model, name, in_place, None),
        "in place, dense, before": answered(base, name, in_place, None),
        "linked, recall, through the cache": decoded(model, plan, gist),
    }
    outcomes = {how: dict(zip(("one_hop", "two_hop", "loss", "unfolded"), outcome)) for how, outcome in readings.items()}
    return {"arm": arm, "seed": seed, "chunk_sizes": list(sizes), "train_s": round(seconds), "readings": outcomes}


@torch.no_grad()
def decoded(model: Transformer, plan: Plan, gist: GistConfig, samples: int = 32) -> tuple[float, float, float, float]:
    """As :func:`answered`, through the cache: every document is read by itself, in another order than it is then joined in."""
    task, starts = plan.task, np.ones(plan.task.vocab_size, bool)
    gists = range(task.gist_ids, task.gist_ids + 4)
    decoder = Decoder(model.eval(), gist, gists, starts, link_ids=task.part_links)
    draw, one, two, loss = np.random.default_rng([model.build.seed, 9]), [], [], 0.0
    for _ in range(samples):
        batch = task.batch(draw, 1, gist)
        raw = batch.ids[0][(batch.layout.level[0] < 0) & (batch.layout.role[0] == Role.PART)].tolist()
        parts = [decoder.read_part(raw[at : at + task.document]) for at in reversed(range(0, task.context, task.document))]
        sequence = decoder.join(parts[::-1])
        answers = torch.zeros_like(batch.ids)
        for place in range(batch.ids.shape[1] - task.questions, batch.ids.shape[1]):
            decoder.read_suffix(sequence, [int(batch.ids[0, place])])
            answers[0, place] = sequence.logits.argmax()
            loss -= float(sequence.logits.log_softmax(-1)[batch.labels[0, place]])
        right = task.score(batch, answers)
        one.append(right[0])
        two.append(right[1])
    mean = lambda found: torch.cat(found).float().mean().item()
    return mean(one), mean(two), loss / (samples * task.questions), 0.0


def table(directory: Path) -> Iterator[str]:
    """Lines in Markdown: means over seeds, one hop / two hops."""
    runs = [json.loads(path.read_text()) for path in sorted(directory.glob("seed*.json"))]
    columns = list(runs[0]["readings"])
    yield f"| chunk sizes | trained | {' | '.join(columns)} | seeds |"
    yield f"|---|---|{'---|' * len(columns)}---|"
    for sizes, arm in dict.fromkeys((tuple(run["chunk_sizes"]), run["arm"]) for run in runs):
        same = [run["readings"] for run in runs if (tuple(run["chunk_sizes"]), run["arm"]) == (sizes, arm)]
        mean = lambda how, hops: statistics.fmean(readings[how][hops] for readings in same)  # noqa: B023
        cells = [f"{mean(how, 'one_hop'):.2f} / {mean(how, 'two_hop'):.2f}" for how in columns]
        yield f"| {', '.join(map(str, sizes))} | {arm} | {' | '.join(cells)} | {len(same)} |"


if __name__ == "__main__":
    main()
