"""Documents that are read once (docs/generation.md#documents-read-once): flags of the commands that join them, messages."""

from __future__ import annotations

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
    """The store that the flags describe. Raises UserError where its directory cannot be made."""
    from unfold.model.decode.store import PartStore

    try:
        return PartStore(decoder, int(args.document_cache_gib * GIB), args.document_cache)
    except OSError as error:
        raise UserError(f"--document-cache {args.document_cache}: cannot be used ({error})") from None


@contextmanager
def refused(names: Sequence[object], documents: Sequence[Sequence[int]]) -> Iterator[None]:
    """Around the reading and joining of documents: what is wrong with them as a UserError. names: what the user calls them by."""
    for name, tokens in zip(names, documents):
        if not tokens:
            raise UserError(f"--document {name}: has no token; leave it out")
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"--document: {error}") from None


def shown_documents(
    decode: Callable[[Sequence[int]], str], prefix: Sequence[int], documents: Sequence[Sequence[int]], question: Sequence[int]
) -> Iterator[str]:
    """Lines for people: what is read, in its parts. decode: ids to text, control tokens by name."""
    kinds = [("prefix", prefix, "as it is; documents do not see it")]
    kinds += [(f"document {i}", ids, "by itself, once; folded and closed") for i, ids in enumerate(documents, 1)]
    kinds.append(("question", question, "recalls among all documents"))
    yield from shown_parts(decode, [kind for kind in kinds if kind[1]])
