"""How much neighbouring queries select alike, on a trained model: what the blocks of the Triton kernels are chosen from.

    python -m tests.benchmarks.selection_overlap --run-dir RUN --text FILE [--raw 2048 8192] [--blocks 4 8 16 32]

Selects in every recalling layer for every raw token of the text (``recall: all``), and counts per block of neighbouring queries
and KV head: ``union``, level-0 gists that any of them selected, over those that one query selected; ``density``, the share of a
block's (query, gist of the union) pairs that were selected, that is useful work in a tile over all work.
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

    def __init__(self, layout, tree, rule, blocks: list[int]):
        self.attend = MicroBatchAttention("gist", layout, None)
        self.tree, self.rule, self.counts = tree, rule, {size: torch.zeros(3) for size in blocks}

    def __call__(self, index, q, k, v):
        if index > 0:
            selection = select_gists(q.flatten(0, 1)[self.tree.tokens], k, self.tree, self.rule)
            for size, count in self.counts.items():
                lists = block_lists(self.tree, selection, size)
                owner, items = lists.items(lists.levels - 1)
                table = lists.blocks.table[owner // lists.kv_heads]
                pairs = count_bits(lists.bits[items]).sum()
                count += torch.tensor([len(table), int((table[:, 1] - table[:, 0]).sum()), int(pairs)])
        return self.attend(index, q, k, v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--raw", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    args = parser.parse_args()
    run = load_run(args.run_dir, None)
    info, gist = run.tokenizer, run.config.gist
    text = info.tokenizer().encode(args.text.read_text(), add_special_tokens=False).ids
    print("| raw tokens | selected per query | block | union / selected | density | same at random |\n|---|---|---|---|---|---|")
    for raw in args.raw:
        ids = torch.tensor(text[:raw]).numpy()
        made = interleave(ids, [len(ids)], info.word_starts, gist, info.gist_ids[: gist.levels])
        level = torch.from_numpy(made.level)[None].long()
        layout = build_layout(level, torch.zeros_like(level), gist)
        tree = build_recall(layout, gist, torch.ones_like(level, dtype=torch.bool))
        record = Record(layout, tree, select_rule(gist), args.blocks)
        with torch.no_grad():
            run.model.run_layers(torch.from_numpy(made.ids)[None], layout.position, record)
        lists = tree.queries * run.model.config.kv_heads * (run.model.config.layers - 1)
        for size, (union, slots, pairs) in record.counts.items():
            each = float(pairs) / lists
            gists = float((tree.hi[gist.levels - 1] - tree.lo[gist.levels - 1]).double().mean())  # level-0 gists before a query
            random = (1 - (1 - each / gists) ** size) * gists / each
            alone = float(union) * size / lists / each
            print(f"| {len(ids)} | {each:.1f} | {size} | {alone:.2f} | {float(pairs / slots):.2f} | {random:.2f} |", flush=True)


if __name__ == "__main__":
    main()
