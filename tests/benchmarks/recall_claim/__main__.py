"""Train small models with and without recall on look-ups in a long context, and report what each finds:

python -m tests.benchmarks.recall_claim --output DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.benchmarks.recall_claim.arms import MAIN, PARTS, WAYS
from tests.benchmarks.recall_claim.command import CHUNK_SIZES, LONGER, recall_claim
from unfold.pretrain.errors import UserError


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where results are kept; what is there stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one set of models each (default: 0 1 2)")
    sizes = " ".join(",".join(map(str, s)) for s in CHUNK_SIZES)
    parser.add_argument(
        "--chunk-sizes", type=_sizes, nargs="+", default=CHUNK_SIZES, metavar="C,..", help=f"of gists (default: {sizes})"
    )
    ways = f"ways of training (default: {' '.join(MAIN)}; one part less each, and bounds: {' '.join(PARTS)})"
    parser.add_argument("--ways", nargs="+", default=MAIN, choices=list(WAYS), metavar="WAY", help=ways)
    words = "raw tokens of a context (default 256); longer ones have no more facts, and are learned in further steps"
    parser.add_argument("--context", type=int, default=256, choices=list(LONGER), help=words)
    words = "layers of every model (default: 3); gists of three levels can be found from the fourth layer on"
    parser.add_argument("--layers", type=int, default=3, metavar="N", help=words)
    parser.add_argument("--report-only", action="store_true", help="train nothing, write the report of what is there")
    words = "so many times the steps of every stage: 0.02 to try the command out, 3 to see what more training brings (default: 1)"
    parser.add_argument("--train-steps", type=float, default=1.0, metavar="FACTOR", help=words)
    return parser.parse_args()


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def main() -> None:
    try:
        for line in recall_claim(read_arguments()):
            print(line, flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
