"""Decoding by plain loops, one query and one head at a time, over all keys of the document: slow, obviously right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unfold.kernels.decode.step import RowStore, Step
from unfold.kernels.select.reference import fewest
from unfold.kernels.select.selection import SelectRule


def decode_attention_reference(
    q: Tensor, layers: Sequence[Sequence[RowStore]], step: Step, rule: SelectRule | None, scale: float
) -> Tensor:
    """Softmax attention of every new token over what it sees.

    Args:
        q: [N, H, D].
        layers: for each query, its sequence's rows of every segment.
        step: what the queries may read.
        rule: how gists are selected.
        scale: factor on the scores.

    Returns:
        [N, H, D] in q's dtype.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    outs = []
    for i, layer in enumerate(layers):
        counts = step.upto[:, i].tolist()
        keys, values = ([which(rows)(0, n).to(wide) for rows, n in zip(layer, counts)] for which in (_keys, _values))
        kv_heads = keys[-1].shape[0]
        for h in range(kv_heads):
            own = q[i].to(wide).unflatten(0, (kv_heads, -1))[h]  # [r, D]
            seen = visible_items(own, [k[h] for k in keys], step, i, rule, scale)
            rows = [(s, row) for s, items in enumerate(seen) for row in sorted(items)]
            k, v = (torch.stack([x[s][h, row] for s, row in rows]) for x in (keys, values))
            outs.append((own @ k.T * scale).softmax(-1) @ v)
    return torch.stack(outs).flatten(0, 1).view_as(q).to(q.dtype)


def _keys(rows: RowStore):
    return rows.keys


def _values(rows: RowStore):
    return rows.values


def visible_items(q: Tensor, keys: Sequence[Tensor], step: Step, i: int, rule: SelectRule | None, scale: float) -> list[set[int]]:
    """Per segment the items that query ``i`` and its KV head attend to. q: [r, D]; keys: per segment [items, D]."""
    seen = [set(range(lo, hi)) for lo, hi in zip(step.lo[:, i].tolist(), step.hi[:, i].tolist())]
    seen[-1] |= set(range(int(step.sinks[i])))
    if not step.recalls[i]:
        return seen
    scores = [(k @ q.T * scale) for k in keys[:-1]]  # [items, r]
    columns = [[s.sum(1)] if rule.share == "group" else list(s.unbind(1)) for s in scores]
    chosen = [_descend([c[head].tolist() for c in columns], step, i, rule, len(q)) for head in range(len(columns[0]))]
    for s in range(step.levels):
        seen[s] = set().union(*(one[s] for one in chosen))
    for gist in seen[step.levels - 1]:
        seen[-1] |= set(range(*_children(step, i, step.levels - 1, gist)))
    return seen


def _children(step: Step, i: int, segment: int, gist: int) -> tuple[int, int]:
    lo, hi = step.borders[i].children(segment, torch.tensor(gist))
    return int(lo), int(hi)


def _descend(score: list[list[float]], step: Step, i: int, rule: SelectRule, group: int) -> list[list[int]]:
    """What one head selects in each segment, best first, given the score of every gist."""
    chosen: list[list[int]] = []
    for s in range(step.levels):
        candidates = list(range(int(step.tail[s, i]), int(step.upto[s, i])))
        for parent in chosen[s - 1] if s else []:
            candidates += range(*_children(step, i, s - 1, parent))
        candidates.sort(key=lambda row: (-score[s][row], row))  # noqa: B023
        if rule.top_p is None:
            count = int(rule.budget(step.span[i], step.upto[s, i], group))
        else:
            count = fewest([score[s][row] for row in candidates], rule.top_p)
        chosen.append(candidates[:count])
    return chosen
