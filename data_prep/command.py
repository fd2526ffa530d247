"""The commands of ``python -m data_prep``: see ``--help``."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from unfold.data_prep.arguments import NAME, SUPERVISED_KEYS, build_parser
from unfold.data_prep.errors import DataError

# The commands import what they need themselves, so that --help and usage errors come at once.


def find_corpus(args: argparse.Namespace) -> list:
    """The corpus that the options name."""
    from unfold.data_prep.corpus.conditions import parse_condition
    from unfold.data_prep.corpus.fields import SupervisedFields
    from unfold.data_prep.corpus.sources import find_sources

    if args.command == "tokenize-supervised":
        kind = {"fields": SupervisedFields(**{name: getattr(args, f"{name}_key") for name in SUPERVISED_KEYS})}
    else:
        kind = {"text_key": args.text_key, "separator": args.document_separator, "chats": args.command == "tokenize"}
    return find_sources(
        args.input,
        **kind,
        format=args.format,
        where=[parse_condition(text) for text in args.where],
        limit=args.max_document_mb << 20,
        say=lambda text: print(f"note: {text}", file=sys.stderr),
    )


def run_train_tokenizer(args: argparse.Namespace) -> int:
    """Train a tokenizer."""
    from unfold.data_prep.tokenization.train import train_tokenizer

    info = train_tokenizer(
        find_corpus(args),
        args.output,
        vocab_size=args.vocab_size,
        gist_levels=args.gist_levels,
        links=args.links,
        model_type=args.model_type,
        user_symbols=tuple(args.user_symbols),
        split_digits=args.split_digits,
        character_coverage=args.character_coverage,
        max_lines=args.max_lines,
        overwrite=args.overwrite,
    )
    print_tokenizer(args.output, info)
    return 0


def run_import_tokenizer(args: argparse.Namespace) -> int:
    """Adopt a tokenizer."""
    from unfold.data_prep.tokenization.adopt import import_tokenizer

    roles = {f"{r}_token": getattr(args, f"{r}_token") for r in ("bos", "eos", "pad") if getattr(args, f"{r}_token")}
    wanted = {"gist_levels": args.gist_levels, "links": args.links}
    info = import_tokenizer(args.input, args.output, **wanted, roles=roles, overwrite=args.overwrite)
    print_tokenizer(args.output, info)
    return 0


def print_tokenizer(output: str, info) -> None:
    """Say what was written."""
    gists = ", ".join(f"{t} = {i}" for t, i in zip(info.gist_tokens, info.gist_ids, strict=True)) or "none"
    links = f", links: {', '.join(map(str, info.link_ids))}" if info.link_ids else ""
    print(f"{output}: {info.kind}, {info.vocab_size:,} ids, gists: {gists}{links}; hash {info.hash[:12]}..")


def run_clean(args: argparse.Namespace) -> int:
    """Leave documents out."""
    from unfold.data_prep.corpus.clean import Rules, clean_corpus

    names = ("min_words", "max_words", "quality", "language", "exact", "near", "mask_pii")
    rules = Rules(**{name: getattr(args, name) for name in names})
    done = clean_corpus(find_corpus(args), args.output, rules, on_error=args.on_error, overwrite=args.overwrite)
    print(f"{args.output}: {done.kept:,} of {done.documents:,} documents; masked in {done.masked:,}")
    for reason, n in sorted(done.dropped.items(), key=lambda entry: -entry[1]):
        print(f"  left out: {n:,} {reason}")
    print(f"{args.output}.dropped.jsonl lists them with file and line")
    return 0


def run_stats(args: argparse.Namespace) -> int:
    """Add up shards."""
    import numpy as np

    from unfold.data_prep.describe import length_histogram
    from unfold.data_prep.format.index import clean_prefix
    from unfold.data_prep.format.shards import open_shard
    from unfold.data_prep.report import draw_lengths, length_statistics

    shards = [open_shard(clean_prefix(prefix), may_be_empty=True) for prefix in args.prefixes]
    if not any(len(shard.lengths) for shard in shards):
        raise DataError(f"{', '.join(args.prefixes)}: not one document in {len(shards)} shards")
    lengths = np.concatenate([shard.lengths for shard in shards])
    totals = {"shards": len(shards), "documents": len(lengths), "tokens": int(lengths.sum(dtype=np.int64))}
    totals["bytes"] = sum(shard.info.files["bin"]["bytes"] for shard in shards)
    if supervised := [shard.spans for shard in shards if shard.spans]:
        totals["context_tokens"] = sum(int(spans.context.sum(dtype=np.int64)) for spans in supervised)
        totals["answers"] = sum(len(spans.ranges) for spans in supervised)
        totals["answer_tokens"] = sum(spans.loss_tokens for spans in supervised)
        if linked := sum(spans.parts for spans in supervised):
            totals["linked_documents"] = linked
    if args.json:
        print(json.dumps({**totals, "lengths": length_statistics(lengths)}))
    else:
        print(", ".join(f"{n:,} {name}" for name, n in totals.items()))
        figures = length_statistics(lengths)
        print(f"tokens in a document: {figures['shortest']:,} to {figures['longest']:,}, mean {figures['mean']:,.1f}")
        print(*length_histogram(lengths), sep="\n")
    if args.plot:
        print(draw_lengths(args.plot, {shard.prefix: shard.lengths for shard in shards}))
    return 0


def run_tokenize(args: argparse.Namespace) -> int:
    """Make shards."""
    from unfold.data_prep.format.templates import find_template

    if 0 < args.max_tokens < args.min_tokens:
        raise DataError(f"--min-tokens {args.min_tokens}: is above --max-tokens {args.max_tokens}, and no document is left")
    template = find_template(args.template, args.tokenizer)
    return make_shards(args, min_tokens=args.min_tokens, template=template)


def run_tokenize_supervised(args: argparse.Namespace) -> int:
    """Make shards of questions and answers."""
    from unfold.data_prep.format.templates import find_template
    from unfold.data_prep.supervised import SupervisedJob

    if args.truncate and not args.max_tokens:
        raise DataError(f"--truncate {args.truncate}: needs --max-tokens, to which contexts are cut")
    if args.document_template and not args.linked:
        raise DataError(f"--document-template {args.document_template!r}: writes linked documents; give --linked, too")
    if args.linked and args.truncate:
        raise DataError(f"--truncate {args.truncate}: cuts contexts, but linked documents are taken whole; leave it out")
    corpus = find_corpus(args)
    template = find_template(args.template, args.tokenizer)
    names = ("chat_context", "allow_empty_context", "max_question", "truncate", "linked", "document_template")
    job = SupervisedJob(corpus[0].fields, *template, **{name: getattr(args, name) for name in names})
    return make_shards(args, corpus, supervised=job)


def make_shards(args: argparse.Namespace, corpus: list | None = None, **options: object) -> int:
    """Tokenise, and say what came of it."""
    from unfold.data_prep.encode import tokenize_corpus

    summary = tokenize_corpus(
        corpus or find_corpus(args),
        args.tokenizer,
        args.output,
        workers=args.workers,
        valid_fraction=args.valid_fraction,
        append_eos=not args.no_eos,
        max_tokens=args.max_tokens,
        part=args.part,
        on_error=args.on_error,
        backend=args.backend,
        plot=not args.no_plot,
        overwrite=args.overwrite,
        **options,
    )
    for prefix, info in summary.shards.items():
        print(
            f"{prefix}: {info.documents:,} documents, {info.tokens:,} tokens, {info.dtype}, "
            f"unigram entropy {info.unigram_entropy_nats:.4f} nats"
        )
    if not args.no_eos and not info.eos_appended:
        print("note: this tokenizer has no end-of-document token, so none was appended")
    counts = summary.counts
    left_out = {"too short": counts.short, "too long": counts.long, "filtered out": counts.filtered}
    others = "".join(f", {n:,} {name}" for name, n in left_out.items() if n)
    print(
        f"read {counts.documents:,} documents ({counts.empty:,} empty ones left out{others}), {counts.text_bytes:,} bytes "
        f"of text in {summary.seconds:.1f} s: {summary.megabytes_per_second:.2f} MB/s; encoder: {summary.backend}"
    )
    if counts.truncated:
        print(f"{counts.truncated:,} contexts were cut to --max-tokens")
    if summary.resumed:
        print(f"{summary.resumed:,} of them were done by an earlier run that was cut off")
    if summary.rejects:
        print(f"{counts.rejected:,} documents could not be used; {summary.rejects} lists them with file and line")
    print(f"report: {', '.join(summary.files)}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check shards; 1 if one is bad."""
    from unfold.data_prep.format.index import clean_prefix
    from unfold.data_prep.tokenization.load import load_tokenizer
    from unfold.data_prep.verify import verify_shard

    tokenizer = load_tokenizer(args.tokenizer).info if args.tokenizer else None
    status = 0
    for prefix in dict.fromkeys(map(clean_prefix, args.prefixes)):
        info, defects = verify_shard(prefix, tokenizer)
        for defect in defects:
            print(f"data_prep: error: {defect}", file=sys.stderr)
        if defects:
            status = 1
        else:
            print(f"{prefix}: OK, {info.documents:,} documents, {info.tokens:,} tokens")
    return status


def run_inspect(args: argparse.Namespace) -> int:
    """Show a shard."""
    from unfold.data_prep.describe import describe_shard
    from unfold.data_prep.format.index import clean_prefix
    from unfold.data_prep.tokenization.load import load_tokenizer

    if args.documents and not args.tokenizer:
        raise DataError(f"--documents {args.documents}: needs --tokenizer, to turn ids back into text")
    if args.chunk_sizes and not args.tokenizer:
        raise DataError(f"--chunk-sizes {','.join(map(str, args.chunk_sizes))}: needs --tokenizer, to show text with its gists")
    if not args.word_aware and not args.chunk_sizes:
        raise DataError("--no-word-aware: needs --chunk-sizes, to show text with its gists")
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    documents = 1 if args.documents is None else args.documents
    gists = args.chunk_sizes, args.word_aware
    for line in describe_shard(clean_prefix(args.prefix), tokenizer, documents, args.max_chars, *gists):
        print(line)
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Concatenate shards."""
    from unfold.data_prep.format.index import clean_prefix
    from unfold.data_prep.merge import merge_shards

    info = merge_shards([clean_prefix(p) for p in args.input], args.output, overwrite=args.overwrite)
    print(f"{args.output}: {info.documents:,} documents, {info.tokens:,} tokens from {len(args.input)} shards")
    return 0


COMMANDS = {
    "train-tokenizer": run_train_tokenizer,
    "import-tokenizer": run_import_tokenizer,
    "clean": run_clean,
    "tokenize": run_tokenize,
    "tokenize-supervised": run_tokenize_supervised,
    "stats": run_stats,
    "verify": run_verify,
    "inspect": run_inspect,
    "merge": run_merge,
}


def _terminated(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # unwinds, so that work is noted or removed


def _stopped(what: str, command: str) -> None:
    kept = "run the same command again to go on" if command.startswith("tokenize") else "no output was written"
    print(f"data_prep: error: {what}; {kept}", file=sys.stderr)


def main(argv: Sequence[str] | None = None, name: str = NAME) -> int:
    """Run a command; returns the exit status."""
    args = build_parser(name).parse_args(argv)
    try:
        return COMMANDS[args.command](args)
    except DataError as e:
        message = str(e)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # the reader of our output has gone: nothing to report to
        return 0
    except OSError as e:
        message = f"{e.filename or args.command}: {e.strerror or e}"
    except KeyboardInterrupt:
        _stopped("interrupted", args.command)
        return 130
    except SystemExit as e:
        _stopped("terminated", args.command)
        return int(e.code)
    print(f"data_prep: error: {message}", file=sys.stderr)
    return 1


def run(argv: Sequence[str] | None = None, name: str = NAME) -> NoReturn:
    """Run a command as the whole of this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how many processors are used
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main(argv, name))
