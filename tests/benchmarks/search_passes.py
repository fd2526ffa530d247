"""How often the search of selection and of decoding goes through its candidates, counted in the kernels themselves.

    python -m tests.benchmarks.search_passes [--raw 8192 32768] [--blocks 4] [--run-dir RUN --text FILE]

Runs the Triton kernels in Triton's interpreter (no GPU needed, no time is measured) at tiles, held scores and heads as on a GPU,
on the last queries of a document: keys and queries of random normal numbers, or those of a trained model's recalling layers.
Select: tiles visited over tiles of one pass, so that a sample counts as a fraction, until the bound is found; two more
passes count and write the lists. Four-fold: the passes of a search by four-fold steps alone, over the same scores at the top,
until the slowest of 32 rows is done. Decode: passes over scores in registers, until the slowest head is done.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are made

import numpy as np
import torch

from unfold.kernels.bench_recall import PlainRows, _uniform_step, rule_for
from unfold.kernels.compressed.tiles import Tile
from unfold.kernels.decode import decode_attention
from unfold.kernels.decode import kernels as decoding
from unfold.kernels.decode import triton as decode_backend
from unfold.kernels.select import kernels as selecting
from unfold.kernels.select import triton as select_backend
from unfold.kernels.select.selection import SelectRule
from unfold.kernels.testing import uniform_tree
from unfold.kernels.tree import GistTree

CHUNKS = (8, 4)
HEADS, KV_HEADS, DIM = 4, 1, 64
QUERIES = 8  # of a block
TILES = (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2))


def select_passes(q: torch.Tensor, k: torch.Tensor, tree: GistTree, rule: SelectRule) -> dict[bool, float]:
    """Passes of the search per list, at the top (True) and below. q: [N, H, D], k: [B, T, Hkv, D]."""
    visits: Counter[bool] = Counter()
    plain_tile, plain_held, plain_tiles = selecting._tile, select_backend.held, select_backend.tiles_for

    def counted(*arguments):
        places, span, keys, top = (arguments[i] for i in (13, 15, 22, 25))
        visits[bool(top)] += 1 / -(-_number(places + span) // keys)
        return plain_tile(*arguments)

    selecting._tile = counted
    select_backend.held = lambda tile: plain_held(tile, False)
    select_backend.tiles_for = lambda q, share: TILES
    try:
        lists = select_backend.select_lists(q, k, tree, rule, QUERIES)
    finally:
        selecting._tile, select_backend.held, select_backend.tiles_for = plain_tile, plain_held, plain_tiles
    count = lists.first.shape[1] - 1
    return {top: visits[top] / count - 2 for top in visits}


def _number(x) -> int:
    """A scalar of the interpreter."""
    return int(x.handle.data.item()) if hasattr(x, "handle") else int(x)


def four_fold(scores: np.ndarray, budget: int) -> int:
    """Passes of the search by four-fold steps alone, the first for minimum and maximum. scores: [n] float32."""
    bits = np.where(scores == 0, np.float32(0), scores).view(np.int32).astype(np.int64)
    ordered = np.sort(np.where(bits >= 0, bits, bits ^ 0x7FFFFFFF))
    over = lambda bound: len(ordered) - int(np.searchsorted(ordered, bound))
    first, end, passes = int(ordered[0]), int(ordered[-1]) + 1, 1
    while over(first) > budget and end - first > 1:
        passes += 1
        bounds = [first + (end - first) * i // 4 for i in (1, 2, 3)]
        first = max([first] + [b for b in bounds if over(b) >= budget])
        end = min([end] + [b for b in bounds if over(b) < budget])
    return passes


def top_scores(q: torch.Tensor, k: torch.Tensor, tree: GistTree) -> np.ndarray:
    """[N * H, gists]: of every row, all gists at the top (which the last queries of a document all see)."""
    keys = k[0, tree.others.rows[0, : int(tree.hi[0, -1])]].float()  # [gists, Hkv, D]
    return torch.einsum("nhgd,khd->nhgk", q.float().unflatten(1, (k.shape[2], -1)), keys).flatten(0, 2).numpy()


def slowest_four_fold(q: torch.Tensor, k: torch.Tensor, tree: GistTree, rule: SelectRule) -> float:
    """Mean over the blocks of the passes of their slowest row."""
    group = q.shape[1] // k.shape[2]
    budget = rule.budget(tree.span, tree.hi[0] - tree.lo[0], group).repeat_interleave(q.shape[1]).tolist()
    passes = np.array([four_fold(row, n) for row, n in zip(top_scores(q, k, tree), budget)])
    rows = QUERIES * q.shape[1]
    return float(np.mean([passes[i : i + rows].max() for i in range(0, len(passes), rows)]))


def decode_passes(raw: int, seed: int) -> float:
    """Passes of the searches of one step, on average over the levels: one for mean and spread, then those of the search."""
    counts = [raw // 32, raw // 8]
    step = _uniform_step(counts, raw, CHUNKS, 1)
    g = torch.Generator().manual_seed(seed)
    layers = [[PlainRows(torch.randn(2, KV_HEADS, rows, DIM, generator=g)) for rows in (*counts, raw + 1)]]
    calls: Counter[str] = Counter()
    plain_over, plain_bound, plain_searched = decoding._over, decoding._bound, decode_backend.searched

    def count(name, function):
        def counted(*arguments):
            calls[name] += 1
            return function(*arguments)

        return counted

    decoding._over, decoding._bound = count("passes", plain_over), count("searches", plain_bound)
    decode_backend.searched = lambda capacity, rows: plain_searched(capacity, rows, decode_backend.HELD)
    try:
        decode_attention(torch.randn(1, HEADS, DIM, generator=g), layers, step, rule_for(CHUNKS, None), backend="triton")
    finally:
        decoding._over, decoding._bound, decode_backend.searched = plain_over, plain_bound, plain_searched
    return 1 + calls["passes"] / calls["searches"]


def random_case(raw: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor, GistTree, SelectRule]:
    tree = uniform_tree(raw, CHUNKS, blocks * QUERIES)
    g = torch.Generator().manual_seed(raw)
    q, k = (torch.randn(*shape, DIM, generator=g) for shape in ((tree.queries, HEADS), (1, tree.others.tokens, KV_HEADS)))
    return q, k, tree, rule_for(CHUNKS, None)


def model_cases(run_dir: Path, text: Path, raw: int, blocks: int):
    """Queries and keys of the first KV head of every recalling layer of a trained model on the text's first tokens."""
    from unfold.model.gist import build_layout, build_recall, interleave, select_rule
    from unfold.model.visibility import MicroBatchAttention
    from unfold.pretrain.checkpoint.load import load_run

    run = load_run(run_dir, None)
    info, gist, kept = run.tokenizer, run.config.gist, []
    ids = np.array(info.tokenizer().encode(text.read_text(), add_special_tokens=False).ids[:raw])
    made = interleave(ids, [len(ids)], info.word_starts, gist, info.gist_ids[: gist.levels])
    level = torch.from_numpy(made.level)[None].long()
    layout = build_layout(level, torch.zeros_like(level), gist)
    recalls = torch.zeros_like(level, dtype=torch.bool)
    recalls[0, (level[0] < 0).nonzero()[-blocks * QUERIES :, 0]] = True
    tree = build_recall(layout, gist, recalls)
    attend = MicroBatchAttention("gist", layout, None)

    def record(index, q, k, v):
        if index > 0:
            group = q.shape[2] // k.shape[2]
            kept.append((q.flatten(0, 1)[tree.tokens, :group].contiguous(), k[:, :, :1].contiguous()))
        return attend(index, q, k, v)

    with torch.no_grad():
        run.model.run_layers(torch.from_numpy(made.ids)[None], layout.position, record)
    return [(q.float(), k.float(), tree, select_rule(gist)) for q, k in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--blocks", type=int, default=4, help="blocks of 8 queries, the last of the document")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    print("| scores | raw tokens | four-fold, top | select, top | select, below | decode |\n|---|---|---|---|---|---|")
    for raw in args.raw:
        if args.run_dir:
            cases, decode = model_cases(args.run_dir, args.text, raw, args.blocks), ""
        else:
            cases, decode = [random_case(raw, args.blocks)], f"{np.mean([decode_passes(raw, s) for s in range(args.blocks)]):.1f}"
        counted = [select_passes(*case) for case in cases]
        top, below = (np.mean([c[which] for c in counted]) for which in (True, False))
        before = np.mean([slowest_four_fold(*case) for case in cases])
        kind = "model" if args.run_dir else "normal"
        print(f"| {kind} | {raw} | {before:.1f} | {top:.2f} | {below:.2f} | {decode} |", flush=True)


if __name__ == "__main__":
    main()
