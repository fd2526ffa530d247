"""How evenly ranks that share a sample work: (query, key) pairs of each, counted: of parts in a row, and of even slices.

    python -m tests.benchmarks.context_balance --raw 1048576 --ranks 8
    python -m tests.benchmarks.context_balance --raw 1048576 --ranks 8 --documents 6

*Forgetting*: what the compressed mask shows. *Recall*: every raw token recalls with the adaptive budget; counted per query head
are the gists that are scored (all of the top level, below it the children of those selected), and the keys that are read (what
is selected, the raw tokens behind it, window and sinks). Bytes: keys and values that a rank sends per layer while forgetting,
with 8 KV heads of dimension 128 in bf16.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from unfold.kernels.select import SelectRule
from unfold.kernels.tree import GistTree
from unfold.model.gist import GistConfig, Layout, build_layout, build_recall, interleave
from unfold.model.gist.recall import recalling_tokens, select_rule
from unfold.model.parallel.context import make_plan
from unfold.model.parallel.division import Division, imbalance, sum_by_rank, visible_pairs

ROW = 2 * 8 * 128 * 2  # bytes of a token's keys and values
GROUP = 4  # query heads per KV head


def lay_out(raw: int, documents: int, config: GistConfig, multiple: int) -> Layout:
    """Documents of random lengths, padded to a multiple."""
    borders = np.sort(np.random.default_rng(0).choice(np.arange(1, raw), documents - 1, replace=False))
    lengths = np.diff([0, *borders, raw]).tolist()
    made = interleave(np.zeros(raw, np.int64), lengths, np.ones(1, bool), config, range(1, config.levels + 1))
    pad = lambda x: torch.from_numpy(np.pad(x, (0, -len(x) % multiple), constant_values=-1))[None]
    return build_layout(pad(made.level), pad(made.doc), config)


def recalled_pairs(tree: GistTree, rule: SelectRule, chunk_sizes: tuple[int, ...], division: Division) -> list[int]:
    """Of every rank, per query head."""
    ranges = tree.hi - tree.lo  # [L + 2, N]
    pairs = ranges[0].long()  # scored at the top
    pairs += ranges[tree.levels :].sum(0)  # window and sinks
    for segment in range(tree.levels):
        gists = ranges[segment]
        selected = rule.budget(tree.span, gists, GROUP).minimum(gists)
        # Each is read, and either its children are scored or the raw tokens behind it are read.
        pairs += selected * (1 + chunk_sizes[tree.levels - 1 - segment])
    total = torch.zeros(division.tokens, dtype=torch.int64)
    return sum_by_rank(total.index_add_(0, tree.tokens % division.tokens, pairs), division)


def sent_bytes(layout: Layout, division: Division) -> int:
    """By the rank that sends most, to all others."""
    exported = make_plan(layout, division, 0).exports.exported.shape[1]
    return exported * (division.ranks - 1) * ROW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, default=1 << 20, help="raw tokens of the sample")
    parser.add_argument("--documents", type=int, default=1, help="of random lengths, packed into the sample")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 4], help="gist.chunk_sizes")
    args = parser.parse_args()
    config = GistConfig(tuple(args.chunks), recall="all")
    layout = lay_out(args.raw, args.documents, config, args.ranks)
    tree = build_recall(layout, config, recalling_tokens(layout, config))
    print(
        "| most slices of a rank | forgetting: most / mean | recall: most / mean | sent, MiB | plan, s |\n|---|---|---|---|---|"
    )
    tokens, held = layout.intervals.tokens, layout.intervals.tokens // args.ranks
    in_a_row = lambda: Division(tokens, tuple(((n * held, (n + 1) * held),) for n in range(args.ranks)))
    for divide in (in_a_row, lambda: Division.even([layout.intervals], args.ranks)):
        began = time.monotonic()
        division = divide()
        sent, seconds = sent_bytes(layout, division), time.monotonic() - began
        forgetting = imbalance(visible_pairs(layout.intervals, division))
        recall = imbalance(recalled_pairs(tree, select_rule(config), config.chunk_sizes, division))
        print(f"| {division.slices} | {forgetting:.3f} | {recall:.3f} | {sent / 2**20:.1f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
