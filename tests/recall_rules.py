"""docs/method.md#recall restated as slow, literal Python over token lists: knows nothing of rows, ranges or trees."""

from __future__ import annotations

import math


class Document:
    """What a query at token ``i`` of a sample finds before it in its document. level, doc: lists of T.

    role, part: of samples with bundles, lists of T; roles are words.
    """

    def __init__(self, level, doc, i, levels, chunk_sizes, sink, n_prev, role=None, part=None):
        self.i, self.levels, self.sink, self.n_prev = i, levels, sink, n_prev
        self.chunk_sizes = chunk_sizes
        role, part = role or ["text"] * len(level), part or [0] * len(level)
        same = lambda j: role[i] == "suffix" or (role[j], part[j]) == (role[i], part[i])
        self.items = [j for j in range(i + 1) if doc[j] == doc[i] and same(j)]
        self.level, self.role, self.part = level, role, part

    def gists(self, l):
        return [j for j in self.items if self.level[j] == l]

    def raw(self):
        return [j for j in self.items if self.level[j] == -1]

    def parent(self, j):
        """The gist one level up that closed item j, if it stands before the query."""
        if self.role[j] in ("prefix", "link", "suffix"):
            return None
        return next((p for p in self.gists(self.level[j] + 1) if p > j and self.part[p] == self.part[j]), None)

    def sinks(self):
        """The first raw tokens of the document; for a suffix those of every part, and the whole prefix."""
        if self.role[self.i] != "suffix":
            return self.raw()[: self.sink]
        parts = [[j for j in self.raw() if self.role[j] == "part" and self.part[j] == n] for n in set(self.part)]
        return [j for j in self.raw() if self.role[j] == "prefix"] + [j for own in parts for j in own[: self.sink]]

    def window(self):
        """Raw tokens of the query's own and the n_prev previous chunks; for a suffix links and suffix."""
        if self.role[self.i] == "suffix":
            return {j for j in self.raw() if self.role[j] in ("link", "suffix")}
        closed = self.gists(0)
        before = closed[-1 - self.n_prev] if len(closed) > self.n_prev else -1
        return {j for j in self.raw() if j > before}


def budget(document, l, group, topk=None, ratio=None, everything=False):
    """How many gists of level l one query selects."""
    if everything:
        return len(document.gists(l))
    if topk is not None:
        return topk
    ratio = ratio or math.prod(document.chunk_sizes)
    k = len(document.items) // (ratio * group * document.chunk_sizes[0]) + 1
    return min(k, max(1, len(document.gists(l)) // 4))


def select(document, score, group, topk=None, top_p=None, ratio=None, everything=False):
    """One descent with one score per token. Returns {level: set of tokens}."""
    chosen = {}
    for l in reversed(range(document.levels)):
        gists = document.gists(l)
        if l + 1 < document.levels:
            gists = [j for j in gists if document.parent(j) is None or document.parent(j) in chosen[l + 1]]
        gists.sort(key=lambda j: (-score[j], j))
        if top_p is None:
            chosen[l] = set(gists[: budget(document, l, group, topk, ratio, everything)])
            continue
        largest = max((score[j] for j in gists), default=0.0)
        weights = [math.exp(score[j] - largest) for j in gists]
        chosen[l], reached = set(), 0.0
        for j, weight in zip(gists, weights):
            if reached >= top_p:
                break
            chosen[l].add(j)
            reached += weight / sum(weights)
    return chosen


def group_selection(document, scores, share, **how):
    """The selection of one KV group. scores: one list of T per query head. Returns {level: set of tokens}."""
    if share == "group":
        return select(document, [sum(column) for column in zip(*scores)], len(scores), **how)
    each = [select(document, score, len(scores), **how) for score in scores]
    return {l: set().union(*(chosen[l] for chosen in each)) for l in range(document.levels)}


def unfolded(document, chosen):
    """Every token that the query attends to, given its group's selection."""
    chunks = {j for j in document.raw() if document.parent(j) in chosen[0]}
    return set().union(*chosen.values()) | chunks | set(document.sinks()) | document.window() | {document.i}
