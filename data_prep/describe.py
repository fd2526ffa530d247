"""A shard in words: counts, document lengths, the first documents as text, with the gists that a model would see."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.shards import Shard, open_shard
from unfold.data_prep.format.spans import Spans
from unfold.data_prep.format.tokenizer import Tokenizer
from unfold.data_prep.verify import check_tokenizer

BAR = 40


def describe_shard(
    prefix: str,
    tokenizer: Tokenizer | None = None,
    documents: int = 0,
    max_chars: int = 0,
    chunk_sizes: Sequence[int] = (),
    word_aware: bool = True,
) -> Iterator[str]:
    """Yield the lines that `inspect` prints.

    Args:
        tokenizer: turns ids back into text.
        documents: how many documents to show.
        max_chars: cut each after so many characters; 0 shows all.
        chunk_sizes: put the gists of these sizes in as `<gist0>`, `<gist1>`, ..; none: leave them out.
        word_aware: whether chunks grow to where a word starts.

    Raises:
        DataError: the shard is damaged, or of another tokenizer; chunk sizes that cannot be.
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
            text = marked_text(shard, i, tokenizer, chunk_sizes, word_aware)
            cut = bool(max_chars) and len(text) > max_chars
            yield f"{text[:max_chars]}\n[.. {len(text) - max_chars:,} more characters]" if cut else text


def marked_text(shard: Shard, i: int, tokenizer: Tokenizer, chunk_sizes: Sequence[int] = (), word_aware: bool = True) -> str:
    """Document i as text, without its end-of-document id.

    Of a supervised shard `[context ends]` and `[answer]`..`[/answer]` are put in, before each part of a linked context
    `[document 1]` and so on, for ``chunk_sizes`` the gists.
    """
    ids, spans = shard.document(i), shard.spans
    edges = spans[i : i + 1].edges.tolist() if spans else []
    context = int(spans.context[i]) if spans else -1
    marks = gist_marks(ids, context, edges, tokenizer, chunk_sizes, word_aware) if chunk_sizes else []
    if spans:
        marks += [(edge, f"[document {j}]") for j, edge in enumerate(edges[:-1], 1)]
        marks.append((int(spans.context[i]), "[context ends]"))
        for begin, end in spans[i : i + 1].ranges.tolist():
            marks += [(begin, "[answer]"), (end, "[/answer]")]
    text, at = "", 0
    for place, mark in sorted(marks, key=lambda m: m[0]):  # stable: a context's gists come before its end
        text += tokenizer.decode(ids[at:place].tolist()) + mark
        at = place
    return text + tokenizer.decode(ids[at:].tolist())


def gist_marks(
    ids: np.ndarray,
    context: int,
    edges: Sequence[int],
    tokenizer: Tokenizer,
    chunk_sizes: Sequence[int],
    word_aware: bool,
) -> list[tuple[int, str]]:
    """(raw tokens before it, its name) of each gist that a model with these chunk sizes would see in a document.

    context: tokens of the closed context, -1 for a document that is all text; edges: of a linked one. Where gists go is decided
    in one place, the model's; this is the one thing of it that data_prep uses.
    """
    from unfold.model.gist import Bundle, GistConfig, interleave

    try:
        config = GistConfig(tuple(chunk_sizes), links=0, word_aware=word_aware)  # links stand for no text of a shard
    except ValueError as e:
        raise DataError(f"--chunk-sizes: {e}") from None
    levels = range(config.levels)
    bundle = Bundle(edges[0], tuple(np.diff(edges).tolist())) if edges else None
    where = {"contexts": [-1 if bundle else context], "bundles": [bundle]}
    made = interleave(ids.astype(np.int64), [len(ids)], tokenizer.word_starts(), config, levels, **where)
    before = np.cumsum(made.level < 0)
    return [(int(before[at]), f"<gist{made.level[at]}>") for at in np.flatnonzero(made.level >= 0)]


def span_figures(spans: Spans, tokens: int) -> str:
    """One line on contexts and answers of documents that hold so many tokens."""
    context, answers = int(spans.context.sum(dtype=np.int64)), spans.loss_tokens
    linked = f", {spans.parts:,} linked documents" if spans.parts else ""
    return (
        f"supervised: {len(spans.ranges):,} answers with {answers:,} tokens ({answers / tokens:.1%}), contexts of "
        f"{context:,} tokens ({context / tokens:.1%}), longest {int(spans.context.max()):,}{linked}"
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
