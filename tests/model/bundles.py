"""Bundles of documents, stated pair by pair (docs/method.md#linked-contexts), and a model's logits under masks: slow, literal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests import rules
from unfold.model.config import GistConfig
from unfold.model.transformer import Transformer


@dataclass(frozen=True)
class Rows:
    """The interleaved rows of a bundle, in order; all lists are [T].

    Attributes:
        ids, level, position: vocabulary ids, levels (-1 is raw), rotary positions.
        kind: 'prefix', 'part', 'link' or 'suffix'.
        part: of a part's rows and links its number from 0.
        sink: whether a row is a sink of its part.
    """

    ids: list[int]
    level: list[int]
    position: list[int]
    kind: list[str]
    part: list[int]
    sink: list[bool]


def bundle(prefix, documents, link_ids, suffix, starts, config: GistConfig, gists) -> Rows:
    """Prefix, closed documents, links of each, suffix: all lists of raw ids."""
    rows, at = [], 0
    for token in prefix:
        rows.append((token, -1, at, "prefix", -1, False))
        at += 1
    for number, tokens in enumerate(documents):
        shape = starts, config.chunk_sizes, config.sink, list(gists), True, config.word_aware
        made = rules.insert_gists(tokens, [len(tokens)], *shape)
        for token, level, _, place in zip(*made):
            rows.append((token, level, at + place, "part", number, level < 0 and place < config.sink))
        at += len(tokens)
    for number in range(len(documents)):
        for token in link_ids:
            rows.append((token, -1, at, "link", number, False))
            at += 1
    for token in suffix:
        rows.append((token, -1, at, "suffix", -1, False))
        at += 1
    return Rows(*map(list, zip(*rows)))


def visible(rows: Rows, config: GistConfig) -> np.ndarray:
    """bool [T, T], who sees whom under the compressed mask."""
    T, top = len(rows.ids), config.levels - 1
    mask = np.zeros((T, T), bool)
    for number in set(rows.part) - {-1}:
        own = [i for i in range(T) if rows.kind[i] == "part" and rows.part[i] == number]
        levels = [rows.level[i] for i in own]
        mask[np.ix_(own, own)] = rules.visible(
            levels, [0] * len(own), config.levels, config.sink, config.n_prev, config.own_group
        )
    for i in range(T):
        for j in range(i + 1):
            kind = rows.kind[j]
            if rows.kind[i] == "prefix":
                mask[i, j] = kind == "prefix"
            elif rows.kind[i] == "link":
                near = kind == "part" and rows.part[j] <= rows.part[i]
                mask[i, j] = kind in ("prefix", "link") or (near and (rows.sink[j] or rows.level[j] >= 0))
            elif rows.kind[i] == "suffix":
                mask[i, j] = kind != "part" or rows.sink[j] or rows.level[j] == top
    return mask


def unfolded(rows: Rows, mask: np.ndarray) -> np.ndarray:
    """The same where the suffix unfolds everything before it."""
    suffix = np.array([kind == "suffix" for kind in rows.kind])
    return mask | (suffix[:, None] & np.tri(len(suffix), dtype=bool))


@torch.no_grad()
def logits(model: Transformer, rows: Rows, mask: np.ndarray, later: np.ndarray | None = None, first: int = 1) -> torch.Tensor:
    """[T, vocab] by dense masks. later: the mask of layers from ``first`` on."""
    masks = [torch.from_numpy(mask), torch.from_numpy(mask if later is None else later)]

    def attend(index, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [1, H, T, D]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(2, 3)) / q.shape[3] ** 0.5
        return (scores.masked_fill(~masks[index >= first], -torch.inf).softmax(-1) @ v).transpose(1, 2)

    ids, position = torch.tensor([rows.ids]), torch.tensor([rows.position])
    return model.head_logits(model.run_layers(ids, position, attend))[:, 0]
