"""Which chunk sizes a sample of training has, where there is a choice of them, and how samples of several share a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unfold.model.config import GistConfig

DRAWS = 1 << 62  # keeps these draws apart from those that order documents and parts and those that say what recalls


def drawn(gist: GistConfig, seed: int, sample: int) -> GistConfig:
    """The settings of one sample: a pure function of (seed, global sample number); ``gist`` itself where it has no choices."""
    if not gist.choices:
        return gist
    draw = np.random.Generator(np.random.Philox(key=np.array([seed, DRAWS + sample], np.uint64))).random()
    upto = np.cumsum([choice.weight for choice in gist.choices])
    number = np.searchsorted(upto, draw * upto[-1], side="right")
    return gist.with_sizes(gist.choices[min(int(number), len(upto) - 1)].chunk_sizes)


def of_all(gists: Sequence[GistConfig]) -> GistConfig:
    """Settings by which samples of a micro-batch are laid out together: those of the one with most levels.

    Who sees whom follows from where gists are. Of a sample with fewer levels the upper ones have no item, and without any gist
    above them the gists of its own top level are all seen, and all candidates of a selection, as a top level's are.
    """
    return max(gists, key=lambda gist: gist.levels)
