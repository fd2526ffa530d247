"""Parts that generation reads and joins (docs/generation.md#documents-read-once)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from unfold.model.config import TRAINING_ONLY, GistConfig, ModelConfig
from unfold.model.decode.cache import SequenceCache
from unfold.model.gist.joining import JoinedOutline, PartShape
from unfold.model.gist.parts import Identity, Part, side_by_side
from unfold.model.layers import Rotary

# Settings that say nothing of how a part is read: of links, of training; and where no token of a part recalls, of recall.
OTHERS = {*TRAINING_ONLY, "links"}
OF_RECALL = {"recall", "topk", "top_p", "budget_ratio", "share", "unfold_all", "recall_from"}


def identity_of(
    model: nn.Module, config: ModelConfig, gist: GistConfig, gist_ids: Sequence[int], word_starts: np.ndarray | None
) -> Identity:
    """Of a model on one rank. gist_ids: those of its levels."""
    left_out = OTHERS if gist.recall == "all" else OTHERS | OF_RECALL
    if gist.word_aware:  # told by the bitmap, as in parts from before there was a choice
        left_out = left_out | {"word_aware"}
    folding = {name: value for name, value in asdict(gist).items() if name not in left_out}
    starts = np.asarray(word_starts if gist.word_aware else (), bool)
    words = np.packbits(starts).tobytes()
    return Identity.of(model.named_parameters(), (asdict(config), folding), (words, len(starts), list(gist_ids)))


def part_of(identity: Identity, ids: Sequence[int], cache: SequenceCache) -> Part:
    """Of a sequence that was read and closed. ids: its raw tokens."""
    of_layers = lambda s: [cache.layers[index][s].buffer.rows for index in cache.held(s)]
    held = [torch.stack(of_layers(s), 1) for s in range(len(cache.outline.counts))]
    return Part(identity, list(ids), PartShape.of(cache.outline), tuple(held))


@torch.no_grad()
def join(cache: SequenceCache, parts: Sequence[Part], config: ModelConfig) -> None:
    """Put the parts' keys and values into a cache that holds its prefix alone: keys turned by their parts' offsets.

    cache: its outline is a JoinedOutline of the parts, in their order.
    """
    outline: JoinedOutline = cache.outline
    for s in range(outline.levels + 1):
        order, *positions = outline.gather([part.shape for part in parts], s)
        if not order:
            continue
        device = cache.layers[0][s].device
        turn = Rotary.turning(*(x.to(device) for x in positions), config, parts[0].rows[s].dtype)
        for place, index in enumerate(cache.held(s)):
            keys, values = side_by_side(parts, order, s, place).to(device)
            cache.layers[index][s].put(keys if index in config.nope_layers else turn.apply(keys), values)
