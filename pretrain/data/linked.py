"""Linked contexts in samples: bundles of documents, in the order of the shard or drawn anew for every sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unfold.model.gist import Bundle, GistConfig
from unfold.pretrain.data.tokenizer import RunTokenizer
from unfold.pretrain.errors import UserError

DRAWS = 3 << 62  # keeps these draws apart from those that order documents and those that say what recalls


def bundle_of(edges: Sequence[int]) -> Bundle | None:
    """edges: the tokens before the end of the prefix and of each part; empty: no linked context."""
    return Bundle(edges[0], tuple(np.diff(edges).tolist())) if len(edges) else None


def shuffle_parts(
    raw: np.ndarray, lengths: Sequence[int], bundles: Sequence[Bundle | None], seed: int, sample: int
) -> list[Bundle | None]:
    """Put the parts of every bundle of a sample in an order that is a pure function of (seed, global sample number).

    raw: int64 [R], changed in place. Returns the bundles in their new order; prefixes and suffixes stay where they are.
    """
    draw = np.random.Generator(np.random.Philox(key=np.array([seed, DRAWS + sample], np.uint64)))
    made, first = [], 0
    for length, bundle in zip(lengths, bundles, strict=True):
        if bundle is not None:
            order = draw.permutation(len(bundle.parts))
            ends = np.cumsum((bundle.prefix, *bundle.parts)) + first
            parts = [raw[ends[j] : ends[j + 1]] for j in order]
            raw[ends[0] : ends[-1]] = np.concatenate(parts)
            bundle = Bundle(bundle.prefix, tuple(map(len, parts)))
        made.append(bundle)
        first += length
    return made


def check_links(tokenizer: RunTokenizer, gist: GistConfig) -> None:
    """Raise UserError where linked contexts need more link ids than the tokenizer has."""
    have = len(tokenizer.link_ids)
    if gist.links > have:
        raise UserError(
            f"gist.links: {gist.links}, but the tokenizer {tokenizer.directory} has {have} link ids; make it with "
            f"--links {gist.links}, or set gist.links={have}"
        )
