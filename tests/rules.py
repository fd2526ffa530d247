"""docs/method.md restated as slow, literal Python: the independent reference that the fast code is held against."""

from __future__ import annotations

import numpy as np


def insert_gists(ids, doc_lengths, word_starts, chunk_sizes, sink, gist_ids, close=False, word_aware=True):
    """docs/method.md#where-gists-go, token by token. Returns lists (ids, level, doc, position)."""
    out = []
    begin = 0
    for doc, length in enumerate(doc_lengths):
        tokens = list(ids[begin : begin + length])
        begin += length
        gists_since = [0] * len(chunk_sizes)  # raw tokens / gists of the level below since the last gist of a level
        chunk_start = sink
        for i, token in enumerate(tokens):
            out.append((token, -1, doc, i))
            gists_since[0] += 1
            if not _closes(tokens, i + 1, chunk_start, chunk_sizes[0], word_starts, word_aware):
                continue
            chunk_start = i + 1
            for level in range(len(chunk_sizes)):
                out.append((gist_ids[level], level, doc, i))
                gists_since[level] = 0
                if level + 1 == len(chunk_sizes):
                    break
                gists_since[level + 1] += 1
                if gists_since[level + 1] < chunk_sizes[level + 1]:
                    break
        if close and tokens:
            for level in range(len(chunk_sizes)):
                if gists_since[level]:
                    out.append((gist_ids[level], level, doc, length - 1))
                    gists_since[level] = 0
                    if level + 1 < len(chunk_sizes):
                        gists_since[level + 1] += 1
    return [list(column) for column in zip(*out)] if out else [[], [], [], []]


def _closes(tokens, seen, chunk_start, size, word_starts, word_aware):
    """Whether the chunk that began at ``chunk_start`` closes after ``seen`` tokens of the document."""
    due = chunk_start + size
    if seen < due or not word_aware:
        return seen == due
    places = [p for p in range(due, due + size // 2 + 1) if p < len(tokens) and word_starts[tokens[p]]]
    return seen == (places[0] if places else due)


def visible(level, doc, levels, sink, n_prev, own_group=False):
    """docs/method.md#who-sees-whom, pair by pair. level, doc: lists of T. Returns bool [T, T]."""
    T = len(level)
    top = levels - 1
    raw_index = [sum(level[j] == -1 and doc[j] == doc[i] for j in range(i)) for i in range(T)]
    # Number of the level-l group that a token lies in: gists of that level before it, its own closing gist excluded.
    group = [[sum(level[j] == l and doc[j] == doc[i] for j in range(i)) for i in range(T)] for l in range(levels)]
    mask = np.zeros((T, T), dtype=bool)
    for i in range(T):
        mask[i, i] = True
        if doc[i] < 0:
            continue
        for j in range(i + 1):
            if doc[j] != doc[i]:
                continue
            l = level[j]
            if l == -1 and raw_index[j] < sink or l == top:
                mask[i, j] = True
            elif level[i] - 1 <= l < top:
                before = 0 if own_group and l < level[i] else n_prev  # of the levels below it a gist sees its own group alone
                mask[i, j] |= group[l + 1][j] >= group[l + 1][i] - before
    return mask


def insert_bundle(ids, prefix, parts, word_starts, chunk_sizes, sink, gist_ids, link_ids, word_aware=True):
    """docs/method.md#linked-contexts for one bundle. Returns lists (ids, level, position, role, part)."""
    out, at, position = [], 0, 0

    def plain(tokens, role, part):
        nonlocal position
        for token in tokens:
            out.append((token, -1, position, role, part))
            position += 1

    plain(ids[:prefix], "prefix", 0)
    at = prefix
    for j, length in enumerate(parts, 1):
        made = insert_gists(ids[at : at + length], [length], word_starts, chunk_sizes, sink, gist_ids, True, word_aware)
        for token, level, _, within in zip(*made):
            out.append((token, level, position + within, "part", j))
        position += length
        at += length
    for j in range(1, len(parts) + 1):
        plain(link_ids, "link", j)
    plain(ids[at:], "suffix", len(parts))
    return [list(column) for column in zip(*out)]


def visible_linked(level, role, part, levels, sink, n_prev, own_group=False):
    """docs/method.md#linked-contexts, pair by pair, within one bundle. Lists of T; roles are words. Returns bool [T, T]."""
    T = len(level)
    of_part = [part[i] if role[i] == "part" else -1 for i in range(T)]
    within = visible(level, of_part, levels, sink, n_prev, own_group)  # a part is a document to itself
    raw_index = [sum(level[k] == -1 and of_part[k] == of_part[j] for k in range(j)) for j in range(T)]
    mask = np.eye(T, dtype=bool)
    for i in range(T):
        for j in range(i):
            is_sink = role[j] == "part" and level[j] == -1 and raw_index[j] < sink
            is_gist = role[j] == "part" and level[j] >= 0
            if role[i] == "prefix":
                mask[i, j] = role[j] == "prefix"
            elif role[i] == "part":
                mask[i, j] = of_part[i] == of_part[j] and within[i, j]
            elif role[i] == "link":
                earlier = part[j] <= part[i]
                mask[i, j] = role[j] in ("prefix", "link") or (is_sink or is_gist) and earlier
            else:
                top = level[j] == levels - 1 and is_gist
                mask[i, j] = role[j] in ("prefix", "link", "suffix") or is_sink or top
    return mask


def visible_in(level, doc, role, part, levels, *how):
    """Of a sample whose documents may be bundles: lists of T, the middle two None where there are none. Returns bool [T, T]."""
    mask = visible(level, doc, levels, *how)
    for d in {doc[i] for i in range(len(doc)) if role and role[i] != "text"}:
        own = [i for i in range(len(doc)) if doc[i] == d]
        take = lambda values: [values[i] for i in own]  # noqa: B023
        mask[np.ix_(own, own)] = visible_linked(take(level), take(role), take(part), levels, *how)
    return mask
