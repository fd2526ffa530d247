"""Room that recall keeps for what may be selected, and how long the host works it out, without a GPU.

    python -m tests.benchmarks.list_room [--raw 32768 131072] [--chunks 8 4]

One document of so many raw tokens, of which all or the last tenth recall under the adaptive budget, 32/8 heads, blocks of 16
queries. Lists are kept for the backward pass; scores, places and the chunks' queries live for one pass. A line of Markdown each.
"""

from __future__ import annotations

import argparse
import math
import time

from tests.kernels.uniform import uniform_tree
from unfold.kernels.select import SelectRule
from unfold.kernels.select.room import UNIT, list_room
from unfold.kernels.select.triton import SCRATCH

HEADS, KV_HEADS, QUERIES = 32, 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 4])
    args = parser.parse_args()
    rule = SelectRule(math.prod(args.chunks), args.chunks[0])
    names = (
        "raw tokens",
        "recalling",
        "lists, MB",
        "slices of scores",
        "places, MB",
        "slices of them",
        "chunks' queries, MB",
        "host, s",
    )
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for raw in args.raw:
        for recalling in (raw // 10, raw):
            tree = uniform_tree(raw, tuple(args.chunks), recalling)
            begin = time.perf_counter()
            room = list_room(tree, rule, QUERIES, HEADS, KV_HEADS)
            seconds = time.perf_counter() - begin
            places = max(places for *_, places in room.slices)
            lists = SCRATCH // (4 * QUERIES * HEADS // KV_HEADS * max(room.rooms) * UNIT)  # at once
            slices = math.ceil(room.first.shape[1] / lists)
            entries, slices_of_places = room.entries * 4 / 1e6, len(room.slices)
            sizes = f"{room.items * 8 / 1e6:.0f} | {slices} | {places * 8 / 1e6:.0f} | {slices_of_places} | {entries:.0f}"
            print(f"| {raw} | {recalling} | {sizes} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
