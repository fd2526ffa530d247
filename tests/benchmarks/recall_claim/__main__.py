"""Train small models with and without recall on look-ups in a long context, and report what each finds:

    python -m tests.benchmarks.recall_claim --output DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.benchmarks.recall_claim.command import CHUNK_SIZES, recall_claim
from unfold.pretrain.errors import UserError


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where results are kept; what is there stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one set of models each (default: 0 1 2)")
    parser.add_argument(
        "--ratios", type=int, nargs="+", default=[8, 16, 32], choices=[8, 16, 32], help="compression ratios"
    )
    kinds = list(CHUNK_SIZES)
    parser.add_argument("--gists", nargs="+", default=kinds, choices=kinds, help="levels of gists: one, two (default: both)")
    parser.add_argument("--report-only", action="store_true", help="train nothing, write the report of what is there")
    words = "so many times the steps of every stage: 0.02 to try the command out, 3 to see what more training brings (default: 1)"
    parser.add_argument("--train-steps", type=float, default=1.0, metavar="FACTOR", help=words)
    return parser.parse_args()


def main() -> None:
    try:
        for line in recall_claim(read_arguments()):
            print(line, flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
