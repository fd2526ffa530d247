"""The sub-commands of ``python -m pretrain evaluate``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from pretrain.evaluate.claim.flags import add_arguments as add_claim_arguments


def add_arguments(parser: ArgumentParser) -> None:
    """Sub-commands and their flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    claim = kinds.add_parser(
        "recall-claim", help="experiment: small models, with and without recall, on look-ups in a long context"
    )
    add_claim_arguments(claim)


def evaluate(args: Namespace) -> Iterator[str]:
    """Run the sub-command; yields lines to print."""
    from pretrain.evaluate.claim.command import recall_claim

    yield from recall_claim(args)
