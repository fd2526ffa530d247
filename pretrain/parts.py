"""Documents that are read once (docs/generation.md#documents-read-once): flags of the commands that join them, messages."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from unfold.model.config import GistConfig
from unfold.pretrain.data.chat import shown_parts
from unfold.pretrain.errors import UserError

if TYPE_CHECKING:
    from unfold.model.decode.generation import Decoder
    from unfold.model.decode.store import PartStore
    from unfold.pretrain.data.tokenizer import RunTokenizer

GIB = 1 << 30


def add_document_arguments(parser: ArgumentParser) -> None:
    """Flags of ``generate``."""
    parser.add_argument(
        "--document",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a text that is read by itself, once, and joined with the others in their order; the prompt is a question on them",
    )
    parser.add_argument(
        "--prefix", default="", metavar="TEXT", help="with --document: stands before them, such as an instruction"
    )
    parser.add_argument(
        "--document-cache", type=Path, metavar="DIR", help="keep what was read of documents here, for later calls"
    )
    parser.add_argument(
        "--document-cache-gib", type=float, default=4.0, metavar="N", help="most of it, in memory and in DIR; oldest use goes (4)"
    )
    add_decoding_arguments(parser)


def add_decoding_arguments(parser: ArgumentParser) -> None:
    """Where raw keys and values lie, and how steps are launched."""
    parser.add_argument(
        "--raw-cache",
        choices=("device", "host"),
        default="device",
        help="host: keep keys and values of raw tokens in host memory, and fetch what is unfolded (default device)",
    )
    parser.add_argument(
        "--eager",
        action="store_true",
        help="launch steps on a GPU operation by operation rather than replay them from CUDA graphs; changes nothing on a CPU",
    )


def check_documents(args: Namespace) -> None:
    """Raise UserError for flags that are wrong whatever the model."""
    given = {"--prefix": args.prefix, "--document-cache": args.document_cache}
    if not args.document and (lost := [flag for flag, value in given.items() if value]):
        raise UserError(f"{', '.join(lost)}: needs --document")
    for flag, value in (("--context-file", args.context_file), ("--grow", args.grow)):
        if args.document and value:
            raise UserError(
                f"--document: does not go with {flag}; documents are the context, and what follows them gets no gists"
            )
    if not args.document_cache_gib * GIB >= 1:
        raise UserError(f"--document-cache-gib {args.document_cache_gib}: is not above 0")


def link_ids_of(tokenizer: RunTokenizer, gist: GistConfig) -> tuple[int, ...]:
    """Ids of the links of one document. Raises UserError where the tokenizer has some, but too few."""
    links = tokenizer.link_ids[: gist.links]
    if links or not gist.links:
        if len(links) < gist.links:
            raise UserError(f"gist.links: {gist.links} for each document, but the tokenizer has {len(links)} link ids")
        return links
    print("note: the tokenizer has no link ids (train-tokenizer --links 5); documents are joined without links", file=sys.stderr)
    return ()


def open_store(decoder: Decoder, args: Namespace) -> PartStore:
    """The store that the flags describe. Raises UserError where its directory cannot be made or written to."""
    from unfold.model.decode.store import PartStore

    directory = args.document_cache
    try:
        store = PartStore(decoder, int(args.document_cache_gib * GIB), directory)
    except OSError as error:
        raise UserError(f"--document-cache {directory}: cannot be used ({error})") from None
    if directory and not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--document-cache {directory}: cannot be written to; name a directory of your own, or leave it out")
    return store


def check_fit(args: Namespace, documents: Sequence[Sequence[int]], others: int, most: int) -> int:
    """Tokens that stand before a question. Raises UserError for a document that is empty, and for more than can be joined.

    Args:
        documents: tokens of each --document.
        others: tokens of what stands around them.
        most: positions that the model is meant for.
    """
    for path, tokens in zip(args.document, documents):
        if not tokens:
            raise UserError(f"--document {path}: has no token; leave it out")
    length = others + sum(map(len, documents))
    if documents and length > most:
        path, tokens = max(zip(args.document, documents), key=lambda pair: len(pair[1]))
        raise UserError(
            f"--document: {len(documents)} of them take {length} tokens with prefix and links, but the model is meant for {most} "
            f"(model.max_position); give fewer or shorter ones ({path} has {len(tokens)})"
        )
    return length


@contextmanager
def refused(args: Namespace) -> Iterator[None]:
    """Around the reading and joining of documents: what is wrong with them as a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"--document: {error}") from None
    except OSError as error:
        raise UserError(f"--document-cache {args.document_cache}: {error}; make room or leave it out") from None


def shown_documents(
    decode: Callable[[Sequence[int]], str], prefix: Sequence[int], documents: Sequence[Sequence[int]], question: Sequence[int]
) -> Iterator[str]:
    """Lines for people: what is read, in its parts. decode: ids to text, control tokens by name."""
    kinds = [("prefix", prefix, "as it is; documents do not see it")]
    kinds += [(f"document {i}", ids, "by itself, once; folded and closed") for i, ids in enumerate(documents, 1)]
    kinds.append(("question", question, "recalls among all documents"))
    yield from shown_parts(decode, [kind for kind in kinds if kind[1]])
