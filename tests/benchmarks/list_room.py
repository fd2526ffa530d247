"""Room that recall keeps for what may be selected, and how long the host works it out, without a GPU.

    python -m tests.benchmarks.list_room [--raw 32768 131072] [--chunks 8 4]

One document of so many raw tokens, of which all or the last tenth recall under the adaptive budget, 32/8 heads, blocks of 16
queries. Lists are kept for the backward pass; places and the chunks' queries live for one pass. One line of Markdown each.
"""

from __future__ import annotations

import argparse
import math
import time

from tests.kernels.uniform import uniform_tree
from unfold.kernels.select import SelectRule
from unfold.kernels.select.room import list_room

HEADS, KV_HEADS, QUERIES = 32, 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 4])
    args = parser.parse_args()
    rule = SelectRule(math.prod(args.chunks), args.chunks[0])
    print("| raw tokens | recalling | lists, MB | places, MB | slices | chunks' queries, MB | host, s |\n" + "|---" * 7 + "|")
    for raw in args.raw:
        for recalling in (raw // 10, raw):
            tree = uniform_tree(raw, tuple(args.chunks), recalling)
            begin = time.perf_counter()
            room = list_room(tree, rule, QUERIES, HEADS, KV_HEADS)
            seconds = time.perf_counter() - begin
            places = max(places for *_, places in room.slices)
            sizes = f"{room.items * 8 / 1e6:.0f} | {places * 8 / 1e6:.0f} | {len(room.slices)} | {room.entries * 4 / 1e6:.0f}"
            print(f"| {raw} | {recalling} | {sizes} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
