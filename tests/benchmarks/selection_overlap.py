"""How much neighbouring queries select alike, on a trained model: what the blocks of the Triton kernels are chosen from.

    python -m tests.benchmarks.selection_overlap --run-dir RUN --text FILE [--raw 2048 8192] [--blocks 4 8 16] [--last 16 128]

Selects in every recalling layer for every raw token of the text (``recall: all``), and counts per block of neighbouring queries
and KV head: ``union``, level-0 gists that any of them selected, over those that one query selected; ``density``, the share of a
block's (query, gist of the union) pairs that were selected, that is useful work in a tile over all work.

A second table says which part of all level-0 gists the last queries of the text select together, over all KV heads: what a rank
that has so many recalling queries asks other ranks for, of what it lacks (docs/parallel.md#recall).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from unfold.kernels.select import select_gists
from unfold.kernels.select.blocks import block_lists, count_bits
from unfold.model.gist import build_layout, build_recall, interleave, select_rule
from unfold.model.visibility import MicroBatchAttention
from unfold.pretrain.checkpoint.load import load_run


class Record:
    """Attends as usual, and counts what each layer selects."""

    def __init__(self, layout, tree, rule, blocks: list[int], last: list[int]):
        self.attend = MicroBatchAttention("gist", layout, None)
        self.tree, self.rule, self.counts = tree, rule, {size: torch.zeros(3) for size in blocks}
        self.asked = {number: [] for number in last}  # of every layer

    def __call__(self, index, q, k, v):
        if index > 0:
            selection = select_gists(q.flatten(0, 1)[self.tree.tokens], k, self.tree, self.rule)
            for size, count in self.counts.items():
                lists = block_lists(self.tree, selection, size)
                owner, items = lists.items(lists.levels - 1)
                table = lists.blocks.table[owner // lists.kv_heads]
                pairs = count_bits(lists.bits[items]).sum()
                count += torch.tensor([len(table), int((table[:, 1] - table[:, 0]).sum()), int(pairs)])
            for number, asked in self.asked.items():
                own = selection.start[-1][-number * selection.kv_heads - 1] if number < self.tree.queries else 0
                asked.append(len(selection.rows[-1][own:].unique()))
        return self.attend(index, q, k, v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--raw", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--last", type=int, nargs="+", default=[16, 128, 1024], help="numbers of last queries")
    args = parser.parse_args()
    run = load_run(args.run_dir, None)
    info, gist = run.tokenizer, run.config.gist
    text = info.tokenizer().encode(args.text.read_text(), add_special_tokens=False).ids
    print("| raw tokens | selected per query | block | union / selected | density | same at random |\n|---|---|---|---|---|---|")
    shares = []
    for raw in args.raw:
        ids = torch.tensor(text[:raw]).numpy()
        made = interleave(ids, [len(ids)], info.word_starts, gist, info.gist_ids[: gist.levels])
        level = torch.from_numpy(made.level)[None].long()
        layout = build_layout(level, torch.zeros_like(level), gist)
        tree = build_recall(layout, gist, torch.ones_like(level, dtype=torch.bool))
        record = Record(layout, tree, select_rule(gist), args.blocks, args.last)
        with torch.no_grad():
            run.model.run_layers(torch.from_numpy(made.ids)[None], layout.position, record)
        lists = tree.queries * run.model.config.kv_heads * (run.model.config.layers - 1)
        for size, (union, slots, pairs) in record.counts.items():
            each = float(pairs) / lists
            gists = float((tree.hi[gist.levels - 1] - tree.lo[gist.levels - 1]).double().mean())  # level-0 gists before a query
            random = (1 - (1 - each / gists) ** size) * gists / each
            alone = float(union) * size / lists / each
            print(f"| {len(ids)} | {each:.1f} | {size} | {alone:.2f} | {float(pairs / slots):.2f} | {random:.2f} |", flush=True)
        gists = int((made.level == 0).sum())
        parts = [[n / gists for n in asked] for asked in record.asked.values()]
        shares += [(len(ids), n, sum(p) / len(p), max(p)) for n, p in zip(args.last, parts)]
    print("\n| raw tokens | last queries | part of all chunks: mean of layers | most |\n|---|---|---|---|")
    for raw, number, mean, most in shares:
        print(f"| {raw} | {number} | {mean:.3f} | {most:.3f} |", flush=True)


if __name__ == "__main__":
    main()
