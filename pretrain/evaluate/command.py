"""The sub-commands of ``python -m pretrain evaluate``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from unfold.pretrain.evaluate import passkey, perplexity, rag, routing, tasks

MODEL_COMMANDS = {
    "perplexity": perplexity.perplexity,
    "passkey": passkey.passkey,
    "tasks": tasks.tasks,
    "rag": rag.rag,
    "routing": routing.routing,
}


def add_arguments(parser: ArgumentParser) -> None:
    """Sub-commands and their flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    text = kinds.add_parser("perplexity", help="loss per raw token, by its place in the sequence")
    perplexity.add_arguments(text)
    keys = kinds.add_parser("passkey", help="a key hidden in a long text: found, by length and depth")
    passkey.add_arguments(keys)
    found = kinds.add_parser("routing", help="how much of what attention looks for recall selects, by layer and distance")
    routing.add_arguments(found)
    questions = kinds.add_parser("tasks", help="questions on long contexts: LongBench, RULER, documents")
    tasks.add_arguments(questions)
    retrieved = kinds.add_parser("rag", help="questions on retrieved documents, read joined or one by one")
    rag.add_arguments(retrieved)


def evaluate(args: Namespace) -> Iterator[str]:
    """Run the sub-command; yields lines to print."""
    yield from MODEL_COMMANDS[args.kind](args)
