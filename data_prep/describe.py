"""A shard in words: counts, document lengths, the first documents as text."""

import math
from collections.abc import Iterator

import numpy as np

from data_prep.errors import DataError
from data_prep.shards import Shard, open_shard
from data_prep.spans import Spans
from data_prep.tokenizer import Tokenizer
from data_prep.verify import check_tokenizer

BAR = 40


def describe_shard(
    prefix: str, tokenizer: Tokenizer | None = None, documents: int = 0, max_chars: int = 0
) -> Iterator[str]:
    """Yield the lines that `inspect` prints.

    Args:
        tokenizer: turns ids back into text.
        documents: how many documents to show.
        max_chars: cut each after so many characters; 0 shows all.

    Raises:
        DataError: the shard is damaged, or of another tokenizer.
    """
    shard = open_shard(prefix)
    if tokenizer and (wrong := check_tokenizer(prefix, shard.info, tokenizer.info)):
        raise DataError(wrong[0])
    info, lengths = shard.info, shard.lengths
    size = info.files["bin"]["bytes"]
    yield f"{prefix}: {info.documents:,} documents, {info.tokens:,} tokens, {info.dtype}, {size:,} bytes"
    yield f"tokenizer {info.tokenizer_hash[:12]}.., {info.vocab_size:,} ids, highest id seen {info.max_id:,}"
    yield (
        f"unigram entropy {info.unigram_entropy_nats:.4f} nats; documents "
        f"{'end' if info.eos_appended else 'do not end'} with an end-of-document id; {len(info.sources)} source files"
    )
    yield (
        f"document lengths in tokens: shortest {lengths.min():,}, median {int(np.median(lengths)):,}, "
        f"mean {lengths.mean():,.1f}, longest {lengths.max():,}"
    )
    yield from length_histogram(lengths)
    if shard.spans:
        yield span_figures(shard.spans, info.tokens)
    if tokenizer:
        for i in range(min(documents, info.documents)):
            yield ""
            yield f"--- document {i}, {lengths[i]:,} tokens"
            text = marked_text(shard, i, tokenizer) if shard.spans else document_text(shard, i, tokenizer)
            cut = bool(max_chars) and len(text) > max_chars
            yield f"{text[:max_chars]}\n[.. {len(text) - max_chars:,} more characters]" if cut else text


def document_text(shard: Shard, i: int, tokenizer: Tokenizer) -> str:
    """Document i as text, without its end-of-document id."""
    return tokenizer.decode(shard.document(i).tolist())


def marked_text(shard: Shard, i: int, tokenizer: Tokenizer) -> str:
    """Document i of a supervised shard as text, with `[context ends]` and `[answer]`..`[/answer]` put in."""
    spans, ids = shard.spans, shard.document(i).tolist()
    marks = [(int(spans.context[i]), "[context ends]")]
    for begin, end in spans[i : i + 1].ranges.tolist():
        marks += [(begin, "[answer]"), (end, "[/answer]")]
    text, at = "", 0
    for place, mark in marks:
        text += tokenizer.decode(ids[at:place]) + mark
        at = place
    return text + tokenizer.decode(ids[at:])


def span_figures(spans: Spans, tokens: int) -> str:
    """One line on contexts and answers of documents that hold so many tokens."""
    context, answers = int(spans.context.sum(dtype=np.int64)), spans.loss_tokens
    return (
        f"supervised: {len(spans.ranges):,} answers with {answers:,} tokens ({answers / tokens:.1%}), contexts of "
        f"{context:,} tokens ({context / tokens:.1%}), longest {int(spans.context.max()):,}"
    )


def length_histogram(lengths: np.ndarray) -> list[str]:
    """Lines of a histogram over powers of two of document lengths, int [documents]."""
    powers = np.floor(np.log2(lengths)).astype(int)
    low = int(powers.min())
    counts = np.bincount(powers - low)
    width = len(f"{1 << (low + len(counts)):,}")
    lines = []
    for power, n in enumerate(counts.tolist(), start=low):
        bar = "#" * math.ceil(BAR * n / counts.max())
        lines.append(f"  {1 << power:>{width},} .. {(2 << power) - 1:<{width},} {bar:<{BAR}} {n:,}")
    return lines
