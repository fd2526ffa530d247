"""The flags of ``evaluate recall-claim``, apart from what trains: telling them must not load it."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

CHUNK_SIZES = {
    "flat": {8: (8,), 16: (16,), 32: (32,)},
    "hierarchical": {8: (4, 2), 16: (4, 4), 32: (8, 4)},
}


def add_arguments(parser: ArgumentParser) -> None:
    """The command's flags."""
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
