"""Kinds of layers stated pair by pair (docs/method.md#kinds-of-layers): knows nothing of rows or ranges."""

from __future__ import annotations

import numpy as np

READERS = ("link", "suffix")


def sees(level, doc, kind, sink, role=None, part=None) -> np.ndarray:
    """bool [T, T], who sees whom in a layer that is dense or has a window; level, doc, role (words), part: lists of T."""
    count = len(level)
    role, part = role or ["text"] * count, part or [0] * count
    window = int(kind.split(":")[1]) if ":" in kind else None
    mask = np.zeros((count, count), bool)
    for i in range(count):
        mask[i, i] = True
        if doc[i] < 0:
            continue
        own = lambda j: role[i] in READERS or (role[j], part[j]) == (role[i], part[i])  # noqa: B023
        raw = [j for j in range(i + 1) if doc[j] == doc[i] and level[j] < 0 and own(j)]
        mask[i, raw if window is None else raw[-window:]] = True
        if window is not None:
            mask[i, _sinks(raw, role, part, sink)] = True
    return mask


def _sinks(raw, role, part, sink):
    """The first raw tokens of a document, or of each part; a prefix whole."""
    seen, found = {}, []
    for j in raw:
        unit = role[j], part[j]
        seen[unit] = seen.get(unit, 0) + 1
        if role[j] == "prefix" or role[j] not in READERS and seen[unit] <= sink:
            found.append(j)
    return found
