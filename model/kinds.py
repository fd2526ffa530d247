"""Kinds of layers (docs/method.md#kinds-of-layers): ``gist``, ``dense``, and ``window:N``.

One code for training, generation and exported models, with which this file is shipped: it needs nothing.

In a gist layer tokens see what the method lets them see. In the others every token, a gist too, sees raw tokens of its document
up to itself, and itself: all of them, or the last N and the sinks. A raw token counts itself among the last N, and a gist the raw
token whose position it shares, so N means what Hugging Face's ``sliding_window`` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

WINDOW = "window:"
LONGEST = 1 << 31  # places of tokens are int32

# One kind for all layers, or several that are repeated over them.
Kinds = str | Sequence[str]


def kind_of(kinds: Kinds, layer: int) -> str:
    """That of a layer, counted from 0."""
    return kinds if isinstance(kinds, str) else kinds[layer % len(kinds)]


def window_of(kind: str) -> int | None:
    """N of ``window:N``; None where there is no limit."""
    return int(kind.removeprefix(WINDOW)) if kind.startswith(WINDOW) else None


def describe_kinds(kinds: Sequence[str]) -> str:
    """How many layers are of which kind: ``12 gist, 4 window of 1,024``. kinds: of every layer."""
    name = lambda kind: kind if window_of(kind) is None else f"window of {window_of(kind):,}"
    return ", ".join(f"{count} {name(kind)}" for kind, count in Counter(kinds).items())


def objection(kind: str) -> str:
    """What is wrong with a kind; '' if nothing is."""
    if kind in ("gist", "dense"):
        return ""
    size = kind.removeprefix(WINDOW) if kind.startswith(WINDOW) else ""
    if size.isascii() and size.isdigit() and len(size) < 11 and 0 < int(size) < LONGEST:
        return ""
    return f"{kind!r} is not one of gist, dense, window:N (N raw tokens, at least 1, below {LONGEST})"


def dense_kinds(kinds: Kinds) -> tuple[str, ...]:
    """The same layers where gist layers are dense, what they are to a teacher; windows stay."""
    return tuple("dense" if kind == "gist" else kind for kind in ([kinds] if isinstance(kinds, str) else kinds))
