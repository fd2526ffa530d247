"""A picture of what tokens see: the beginning of a real training sample, its gists, and its mask as a grid."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from html import escape

import numpy as np

from unfold.model.config import GistConfig
from unfold.pretrain.config import RunConfig
from unfold.pretrain.errors import UserError

FEWEST, MOST = 100, 200  # tokens of the picture


@dataclass(frozen=True)
class Picture:
    """The first T tokens of a sample.

    Attributes:
        level: int [T], -1 for raw tokens, 0 .. L-1 for gists.
        doc: int [T], number of the document.
        sink: bool [T], whether the token is a sink.
        mask: bool [T, T], True where query (row) sees key (column).
        text: what each token stands for.
        levels: gist levels of the configuration; 0 for dense attention.
        origin: where the tokens come from, as a sentence.
    """

    level: np.ndarray
    doc: np.ndarray
    sink: np.ndarray
    mask: np.ndarray
    text: list[str]
    levels: int
    origin: str

    def kinds(self) -> np.ndarray:
        """int [T]: 0 sink, 1 raw, 2 + l for a gist of level l."""
        return np.where(self.level >= 0, self.level + 2, np.where(self.sink, 0, 1))


def read_sample(config: RunConfig) -> Picture:
    """The first training sample of a run, or a made-up one where its data cannot be read."""
    gist = config.folding
    length = _length(gist)
    try:
        made, tokenizer = _real_tokens(config, gist)
    except UserError as error:
        raw = length // 2  # with its gists, short of the picture's end
        ids = np.arange(1, length + 1)  # the number of the token stands for its text
        starts = np.random.Generator(np.random.Philox(key=0)).random(length + 1) < 0.7
        origin = f"Made-up tokens: the run's data could not be read ({error})."
        from unfold.model.gist import interleave, without_gists

        lengths = [raw, length - raw]
        none = [0] * (gist.levels if gist else 0)
        made = interleave(ids, lengths, starts, gist, none) if gist else without_gists(ids, lengths)
        return _lay_out(made, gist, length, str, origin)
    encoder = tokenizer.tokenizer()
    origin = "The beginning of the run's first training sample."
    text_of = lambda i: _piece(encoder.id_to_token(i))
    return _lay_out(made, gist, length, text_of, origin)


def _length(gist: GistConfig | None) -> int:
    """Enough tokens that some chunks are forgotten."""
    if gist is None:
        return FEWEST
    return min(max((gist.n_prev + 4) * (gist.chunk_sizes[0] + 2), FEWEST), MOST)


def _real_tokens(config: RunConfig, gist: GistConfig | None):
    """Sample 0 with its gists and links, and the tokenizer. Raises UserError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's advice on optional packages is not for readers of a report
        from unfold.pretrain.data.samples import BatchBuilder, TokenSource
        from unfold.pretrain.data.stretches import stretch_of, stretches_of
        from unfold.pretrain.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.data.tokenizer, gist.levels if gist else 0)
    try:
        data, seed = config.at(1).data, config.train.seed
        source = TokenSource(
            data.train, data.raw_tokens, seed, tokenizer, "data.train", data.cache, stretch_of(data).arranged, False
        )
        source = source.along(stretches_of(config))
        shuffle = data.shuffle_parts
        return BatchBuilder(source, gist, tokenizer, 1, config.train.seed, shuffle).sample(0), tokenizer
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"data.train: {error}") from None


def _lay_out(made, gist: GistConfig | None, length: int, text_of, origin: str) -> Picture:
    """What the first ``length`` tokens of a sample see, which never depends on what comes after them. made: an Interleaved."""
    import torch  # with the layout: seconds of start-up that a wrong argument need not wait for

    from unfold.model.gist import Role, build_layout, raw_layout

    cut = lambda x: x if x is None else torch.from_numpy(x[:length].copy())[None]
    layout = build_layout(*(cut(x) for x in (made.level, made.doc)), gist, cut(made.role), cut(made.part))
    level, doc, levels = made.level[:length], made.doc[:length], gist.levels if gist else 0
    seen = layout if gist else raw_layout(layout, gists=False)
    text = [f"gist {n}" if n >= 0 else text_of(int(i)) for i, n in zip(made.ids, level)]
    first = made.position[layout.first_seen[0].numpy()]  # of the document or part
    sink = (level < 0) & (made.position[:length] - first < (gist.sink if gist else 0))
    if gist and made.role is not None:
        role = made.role[:length]
        sink = (sink & (role <= Role.PART)) | (role == Role.PREFIX)
    return Picture(level, doc, sink, seen.intervals.dense_mask()[0].numpy(), text, levels, origin)


def _piece(token: str | None) -> str:
    """A vocabulary piece for people: the word-start marks of sentencepiece and byte-level BPE become a space."""
    token = (token or "?").replace("▁", " ").replace("Ġ", " ").replace("Ċ", "↵").replace("<0x0A>", "↵")
    return "".join(c if c.isprintable() else "\ufffd" for c in token) if token != " " else "␣"


def kind_name(kind: int) -> str:
    return ("sink", "raw token")[kind] if kind < 2 else f"level-{kind - 2} gist"


def kind_class(kind: int) -> str:
    """CSS class of a kind's colour; levels beyond the fourth share the fourth's."""
    return ("sink", "raw")[kind] if kind < 2 else f"g{min(kind - 2, 3)}"


def draw_strip(sample: Picture, query: int, name: str) -> str:
    """The tokens in reading order, those that ``query`` does not see struck out of focus."""
    cells = []
    for i, (kind, text) in enumerate(zip(sample.kinds().tolist(), sample.text)):
        state = " query" if i == query else "" if sample.mask[query, i] else " unseen"
        boundary = " first" if i and sample.doc[i] != sample.doc[i - 1] else ""
        shown = f"g{kind - 2}" if kind >= 2 else text
        cells.append(f'<span class="token {kind_class(kind)}{state}{boundary}" data-i="{i}">{escape(shown)}</span>')
    return f'<div class="strip" aria-label="tokens of {escape(name, quote=True)}">{"".join(cells)}</div>'


def draw_grid(sample: Picture, query: int) -> str:
    """The mask, one unit per cell, with a band of token kinds at the top and at the left."""
    kinds, tokens = sample.kinds(), len(sample.level)
    causal = np.tril(sample.doc[:, None] == sample.doc[None])
    cell = np.where(sample.mask, kinds[None], np.where(causal, -1, -2))  # [T, T]: -1 earlier but not seen, -2 not earlier
    paths: dict[str, list[str]] = {}
    for i in range(tokens):
        edges = np.flatnonzero(np.diff(cell[i], prepend=-3, append=-3))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist()):
            kind = int(cell[i, start])
            if kind > -2:
                css = "hidden-cell" if kind < 0 else kind_class(kind)
                paths.setdefault(css, []).append(f"M{start} {i}h{stop - start}v1h-{stop - start}z")
    body = "".join(f'<path class="{css}" d="{"".join(d)}"/>' for css, d in sorted(paths.items()))
    bands = "".join(
        f'<rect class="{kind_class(k)}" x="{i}" y="-3.5" width="1" height="2.5"/>'
        f'<rect class="{kind_class(k)}" x="-3.5" y="{i}" width="2.5" height="1"/>'
        for i, k in enumerate(kinds.tolist())
    )
    sees = int(sample.mask.sum())
    label = f"Grid of {tokens} x {tokens} tokens: {sees:,} of {int(causal.sum()):,} causal pairs are visible"
    size = f'style="font-size:{tokens * 0.026:.1f}px" text-anchor="middle"'  # of about the same height at any number of tokens
    return (
        f'<svg class="mask" viewBox="-7 -7 {tokens + 7.5} {tokens + 7.5}" role="img" aria-label="{label}">'
        f'<text x="{tokens / 2}" y="-4.5" {size}>is seen (key) →</text>'
        f'<text transform="translate(-4.5 {tokens / 2}) rotate(-90)" {size}>← looks (query)</text>'
        f'{bands}<g shape-rendering="crispEdges">{body}</g>'
        f'<rect class="row-mark" x="-0.2" y="{query - 0.1}" width="{tokens + 0.4}" height="1.2"/></svg>'
    )


def describe(sample: Picture, query: int) -> str:
    """One sentence on what a token sees; the script writes the same for the token that the reader picks."""
    kinds = sample.kinds()
    seen = sample.mask[query]
    earlier = int((sample.doc[: query + 1] == sample.doc[query]).sum())
    counts = [(kind_name(k), int((seen & (kinds == k)).sum())) for k in range(sample.levels + 2)]
    listed = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts if n)
    return f"Token {query} ({sample.text[query].strip()}) sees {int(seen.sum())} of {earlier} tokens so far: {listed}."


def script_data(sample: Picture) -> dict:
    """What the script needs: per token its kind, text and document start, and the ranges that it sees."""
    ranges = []
    for row in sample.mask:
        edges = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0))
        ranges.append(edges.tolist())
    begin = [int(np.argmax(sample.doc == d)) for d in sample.doc]
    names = [kind_name(k) for k in range(sample.levels + 2)]
    return {"kinds": sample.kinds().tolist(), "text": sample.text, "begin": begin, "sees": ranges, "names": names}
