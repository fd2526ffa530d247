"""The command line's options. argparse only, so that --help and usage errors come at once."""

import argparse
from typing import NoReturn

from unfold.data_prep.format.text import spelled

MOST = 10**15  # no count or size of this program comes near
# Of supervised data; the names of unfold.data_prep.corpus.fields.SupervisedFields, which is not imported for --help alone.
SUPERVISED_KEYS = {
    "context": "the context",
    "question": "the question",
    "answer": "the answer",
    "turns": "a list of questions and answers",
    "messages": "the messages of a chat",
    "prefix": "the text before linked documents",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, f"data_prep: error: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """An integer of at least 1."""
    return at_least(text, 1)


def count(text: str) -> int:
    """An integer of at least 0."""
    return at_least(text, 0)


def at_least(text: str, low: int) -> int:
    """An integer that is not below `low`."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} is too small; it must be at least {low}")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"{value} is beyond any sense; at most {MOST:.0e}")
    return value


def add_links(parser, text: str) -> None:
    """--links, the number of link tokens."""
    parser.add_argument("--links", type=count, default=0, metavar="N", help=text)


def gist_levels(text: str) -> int:
    """A number of gist levels, 0 to 16."""
    if (value := count(text)) > 16:
        raise argparse.ArgumentTypeError(f"{value} is too many; at most 16 levels make sense")
    return value


def fraction(text: str) -> float:
    """A number strictly between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1; 0.01 holds one document in a hundred out")
    return value


def coverage(text: str) -> float:
    """A share of characters, at least 0.98 (sentencepiece's own bound) and at most 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0.98 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.98 and 1")
    return value


def part(text: str) -> tuple[int, int]:
    """I/N with 1 <= I <= N."""
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 3/64")
    return int(first), int(last)


def sizes(text: str) -> tuple[int, ...]:
    """Chunk sizes, such as 8,4."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes of at least 1, such as 8,4")
    return tuple(int(part) for part in parts)


def separator(text: str) -> str:
    """A document separator; backslash-n, -t and -r may be written out."""
    value = spelled(text)
    if not value:
        raise argparse.ArgumentTypeError("must not be empty; leave it out where each file is one document")
    return value


def add_corpus_options(parser: Parser) -> None:
    """Options that say what the corpus of texts is."""
    add_input_options(parser)
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="key or column that holds the text (default: text); meta.text reaches inside. tokenize: or the messages of a chat",
    )
    parser.add_argument(
        "--document-separator",
        type=separator,
        metavar="S",
        help=r"what separates documents in a text file, such as '\n\n\n' (default: a file is one document)",
    )


def add_input_options(parser: Parser) -> None:
    """Options that say which files are read, and which rows of them."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="F",
        help="files, directories (searched through) and quoted globs: .txt .md .jsonl .csv .parquet .arrow, each also "
        "with .gz .zst .xz; directories of datasets.save_to_disk; hf:NAME[@CONFIG][:SPLIT] streams from the hub; @LIST is a "
        "file that names inputs, one a line",
    )
    parser.add_argument(
        "--format",
        choices=("txt", "jsonl", "csv", "parquet", "arrow"),
        help="kind of all inputs, whatever their names end in",
    )
    where_help = "take only rows of which this holds: KEY=VALUE, KEY!=VALUE, KEY>=NUMBER ..; dotted keys reach inside"
    parser.add_argument("--where", nargs="+", action="extend", default=[], metavar="COND", help=where_help)
    limit_help = "a longer line or document is an error, so that memory stays bounded (default: 32)"
    parser.add_argument("--max-document-mb", type=positive, default=32, metavar="N", help=limit_help)


def add_train_tokenizer(commands) -> None:
    """Options of train-tokenizer."""
    p = commands.add_parser(
        "train-tokenizer",
        help="train a sentencepiece tokenizer with gist tokens",
        description="Train a sentencepiece tokenizer on a corpus and write a tokenizer directory.",
    )
    add_corpus_options(p)
    vocab_help = "number of ids in all: pieces, 256 bytes, unk, bos, eos, pad, gists, links and user symbols"
    p.add_argument("--vocab-size", type=positive, required=True, metavar="N", help=vocab_help)
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument("--gist-levels", type=gist_levels, default=4, metavar="L", help="number of gist tokens (default: 4)")
    add_links(p, "number of link tokens, for linked contexts (default: 0; the paper's 5)")
    p.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: bpe")
    symbols_help = "pieces that are always kept whole, such as '<|user|>'"
    p.add_argument("--user-symbols", nargs="+", action="extend", default=[], metavar="S", help=symbols_help)
    p.add_argument("--split-digits", action="store_true", help="make every digit a piece of its own")
    coverage_help = "share of the corpus' characters that become pieces, others are spelled in bytes (default: 0.9995)"
    p.add_argument("--character-coverage", type=coverage, default=0.9995, metavar="X", help=coverage_help)
    p.add_argument("--max-lines", type=count, default=0, metavar="N", help="train on a sample of N lines (default: all)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer directory")


def add_import_tokenizer(commands) -> None:
    """Options of import-tokenizer."""
    p = commands.add_parser(
        "import-tokenizer",
        help="adopt an existing tokenizer, gist tokens appended",
        description="Write a tokenizer directory for an existing tokenizer; its ids stay as they are.",
    )
    input_help = "sentencepiece .model, tokenizer.json, or a directory that has one"
    p.add_argument("--input", required=True, metavar="DIR|FILE", help=input_help)
    p.add_argument("--output", required=True, metavar="DIR")
    levels_help = "gist tokens to have in the end; those that are missing are appended (default: 4)"
    p.add_argument("--gist-levels", type=gist_levels, default=4, metavar="L", help=levels_help)
    add_links(p, "link tokens to have in the end, for linked contexts; missing ones are appended (default: 0; the paper's 5)")
    for role in ("bos", "eos", "pad"):
        p.add_argument(f"--{role}-token", metavar="TOKEN", help=f"the {role} token, where a tokenizer.json names none")
    p.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer directory")


def add_tokenize(commands) -> None:
    """Options of tokenize."""
    p = commands.add_parser(
        "tokenize",
        help="turn a corpus into token shards",
        description="Turn a corpus into PREFIX.bin, .idx (megatron-core IndexedDataset) and a sidecar PREFIX.json.",
    )
    add_corpus_options(p)
    add_encoding_options(p)
    template_help = "Jinja chat template, or 'plain', for rows that are chats (default: the tokenizer's own, else plain)"
    p.add_argument("--template", metavar="FILE|plain", help=template_help)
    p.add_argument("--min-tokens", type=count, default=0, metavar="N", help="leave shorter documents out, and count them")
    p.add_argument("--max-tokens", type=count, default=0, metavar="N", help="leave longer documents out, and count them")


def add_encoding_options(p: Parser) -> None:
    """Options of both commands that make shards."""
    tokenizer_help = "tokenizer directory, sentencepiece .model or tokenizer.json"
    p.add_argument("--tokenizer", required=True, metavar="DIR|FILE", help=tokenizer_help)
    p.add_argument("--output", required=True, metavar="PREFIX")
    workers_help = "encoding processes (default: 1); the files are the same for any number"
    p.add_argument("--workers", type=positive, default=1, metavar="N", help=workers_help)
    valid_help = (
        "hold out this share of the documents: PREFIX_train and PREFIX_valid, split by a hash of each text "
        "(of supervised data: of its context)"
    )
    p.add_argument("--valid-fraction", type=fraction, metavar="F", help=valid_help)
    skip_help = "what to do with documents that cannot be used: end (default), or list them in PREFIX.rejects.jsonl"
    p.add_argument("--on-error", choices=("fail", "skip"), default="fail", help=skip_help)
    p.add_argument("--part", type=part, metavar="I/N", help="make part I of N, as PREFIX-I-of-N: for job arrays")
    backend_help = "auto (default): the fast one where it proves itself identical; the files are the same"
    p.add_argument("--backend", choices=("auto", "exact", "fast"), default="auto", help=backend_help)
    p.add_argument("--no-plot", action="store_true", help="do not draw PREFIX.report.png")
    p.add_argument("--no-eos", action="store_true", help="do not end documents with the end-of-document id")
    p.add_argument("--overwrite", action="store_true", help="replace existing shards")


def add_tokenize_supervised(commands) -> None:
    """Options of tokenize-supervised."""
    p = commands.add_parser(
        "tokenize-supervised",
        help="turn contexts with questions and answers, or chats, into token shards",
        description="Turn rows of {context, question, answer}, {context, turns: [{question, answer} ..]} or {messages}, with "
        "--linked of {documents, question, answer}, into token shards that also say (PREFIX.spans) where each context ends and "
        "which tokens are answers.",
    )
    add_input_options(p)
    for name, what in SUPERVISED_KEYS.items():
        p.add_argument(f"--{name}-key", default=name, metavar="KEY", help=f"key or column of {what} (default: {name})")
    add_encoding_options(p)
    template_help = "a Jinja chat template, or 'plain' (default: the tokenizer's own, else plain)"
    p.add_argument("--template", metavar="FILE|plain", help=template_help)
    chat_help = "before which user message the context of a chat ends that names none (default: last-user)"
    p.add_argument("--chat-context", choices=("last-user", "first-user"), default="last-user", help=chat_help)
    empty_help = "take rows without a context, too; all of such a row follows it"
    p.add_argument("--allow-empty-context", action="store_true", help=empty_help)
    longest_help = "a longer document cannot be used, unless --truncate; at most data.raw_tokens of the training"
    p.add_argument("--max-tokens", type=count, default=0, metavar="N", help=longest_help)
    truncate_help = "cut contexts so that documents hold --max-tokens, at their start or in the middle, and count them"
    p.add_argument("--truncate", choices=("start", "middle"), default="", help=truncate_help)
    linked_help = "read the texts, or {title, text}, under 'documents' one by one, as parts that are joined (linked contexts)"
    p.add_argument("--linked", action="store_true", help=linked_help)
    document_help = "how --linked writes a document, its fields in braces (default: '{title}\\n{text}\\n', or '{text}\\n')"
    p.add_argument("--document-template", type=spelled, default="", metavar="TEXT", help=document_help)
    question_help = "a document with a question (what stands before an answer, after the context) of more cannot be used"
    p.add_argument("--max-question", type=count, default=0, metavar="N", help=question_help)


def add_clean(commands) -> None:
    """Options of clean."""
    p = commands.add_parser(
        "clean",
        help="leave out duplicates and poor texts before tokenising",
        description="Write the documents that stay as jsonl, and list the others beside it. Without options all stay.",
    )
    add_corpus_options(p)
    p.add_argument("--output", required=True, metavar="F.jsonl")
    p.add_argument("--exact", action="store_true", help="leave out texts that came before (white space does not count)")
    near_help = "leave out texts of which a share of the 5-word shingles came before in one text (MinHash), such as 0.8"
    p.add_argument("--near", type=fraction, metavar="SHARE", help=near_help)
    p.add_argument("--min-words", type=count, default=0, metavar="N")
    p.add_argument("--max-words", type=count, default=0, metavar="N", help="0 (default): no bound")
    p.add_argument("--quality", action="store_true", help="leave out what simple rules on words and lines call poor")
    language_help = "leave out what has fewer than two of the commonest words of this language"
    p.add_argument("--language", choices=("en", "de", "fr", "es"), help=language_help)
    p.add_argument("--mask-pii", action="store_true", help="write <email> and <ip> for e-mail addresses and IPv4 numbers")
    p.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="documents that cannot be read")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output")


def add_shard_commands(commands) -> None:
    """Options of verify, inspect and merge."""
    p = commands.add_parser(
        "verify", help="check shards", description="Check structure, hashes and ids of shards; every byte is read."
    )
    p.add_argument("prefixes", nargs="+", metavar="PREFIX")
    p.add_argument("--tokenizer", metavar="DIR|FILE", help="also check that the shards were made with this tokenizer")

    p = commands.add_parser(
        "inspect", help="show what is in a shard", description="Show counts, document lengths, and documents as text."
    )
    p.add_argument("prefix", metavar="PREFIX")
    p.add_argument("--tokenizer", metavar="DIR|FILE", help="needed to show documents")
    documents_help = "show the first K documents (default: 1 with --tokenizer)"
    p.add_argument("--documents", type=count, metavar="K", help=documents_help)
    chars_help = "cut each after N characters; 0 shows all (default: 2000)"
    p.add_argument("--max-chars", type=count, default=2000, metavar="N", help=chars_help)
    sizes_help = "show the documents with the gists that a model with these chunk sizes sees, such as 8,4"
    p.add_argument("--chunk-sizes", type=sizes, default=(), metavar="C,..", help=sizes_help)
    exact_help = "as under gist.word_aware: false, where no chunk grows to where a word starts"
    p.add_argument("--no-word-aware", dest="word_aware", action="store_false", help=exact_help)

    p = commands.add_parser(
        "stats", help="figures of shards", description="Add up shards and show the lengths of their documents."
    )
    p.add_argument("prefixes", nargs="+", metavar="PREFIX")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--plot", metavar="F.png", help="draw the lengths")

    p = commands.add_parser("merge", help="several shards into one", description="Concatenate shards of the same tokenizer.")
    p.add_argument("--input", nargs="+", action="extend", required=True, metavar="PREFIX")
    p.add_argument("--output", required=True, metavar="PREFIX")
    p.add_argument("--overwrite", action="store_true", help="replace an existing shard")


COMMANDS = (
    add_train_tokenizer,
    add_import_tokenizer,
    add_clean,
    add_tokenize,
    add_tokenize_supervised,
    add_shard_commands,
)


NAME = "python -m data_prep"


def build_parser(name: str = NAME) -> Parser:
    """The whole command line."""
    parser = Parser(prog=name, description="Corpora to tokenizers to token shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in COMMANDS:
        add(commands)
    return parser
