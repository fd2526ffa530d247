"""What each token of a sample does beyond forgetting: whether it recalls, unfolds everything, is taken for the routing loss.

All draws are a pure function of (seed, global sample number), so resuming and other layouts see the same.
"""

from __future__ import annotations

import numpy as np

from unfold.model.config import GistConfig
from unfold.model.gist import Interleaved, Role
from unfold.model.gist.recall import RECALLS, ROUTES, UNFOLDS_ALL

DRAWS = 1 << 63  # keeps these draws apart from those that order documents


def sample_flags(made: Interleaved, suffix: np.ndarray, gist: GistConfig, seed: int, sample: int) -> np.ndarray:
    """RECALLS, UNFOLDS_ALL and ROUTES of every token of a sample in training: int32 [T].

    Args:
        made: the sample with its gists.
        suffix: bool [T], the raw tokens after closed contexts.
        gist: which tokens recall, in which part of the samples, and how many of them are taken for the routing loss.
        seed, sample: what is drawn by.
    """
    flags = plain_flags(made, suffix, gist)
    draw = np.random.Generator(np.random.Philox(key=np.array([seed, DRAWS + sample], np.uint64)))
    kind = draw.random()
    if kind < gist.forget_share:
        return np.zeros_like(flags)
    if kind >= 1 - gist.unfold_share:
        flags[flags > 0] |= UNFOLDS_ALL
    if gist.route_loss > 0:
        able = np.flatnonzero((flags > 0) & _after_a_gist(made))
        if len(able) > gist.route_queries:
            able = draw.choice(able, gist.route_queries, replace=False)
        flags[able] |= ROUTES
    return flags


def plain_flags(made: Interleaved, suffix: np.ndarray, gist: GistConfig) -> np.ndarray:
    """The same without what training draws: RECALLS and UNFOLDS_ALL as the settings have it, int32 [T]."""
    recalls = {"none": np.zeros_like(suffix), "suffix": suffix & made.raw, "all": made.raw}[gist.recall]
    return recalls.astype(np.int32) * (RECALLS | UNFOLDS_ALL * gist.unfold_all)


def _after_a_gist(made: Interleaved) -> np.ndarray:
    """bool [T], the tokens with a gist before them in what they read: others have nothing to find."""
    document = np.where(made.level >= 0, made.doc, -1)
    found = np.maximum.accumulate(document) == made.doc
    if made.role is None:
        return found
    step = int(made.part.max()) + 1
    own = made.doc * step + np.where(made.role == Role.PART, made.part, 0)  # of a part that part alone
    within = np.maximum.accumulate(np.where(made.level >= 0, own, -1)) == own
    return np.where(made.role == Role.SUFFIX, found, within)
