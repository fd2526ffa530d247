"""Documents that an exported model reads by themselves, once, and joins in any order. Shipped with exports."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unfold.model.gist.growing import Sight
from unfold.model.gist.joining import JoinedOutline, PartShape
from unfold.model.gist.parts import Identity, Part, check_parts, side_by_side, turning

from .gist_attention import GistPass
from .gist_sequence import GistSequence, GistSettings

# Settings by which a part is read, and by which its tokens recall.
READING = ("chunk_sizes", "sink", "n_prev", "own_group", "layer_attention")
RECALLING = ("recall_from", "topk", "top_p", "budget_ratio", "share", "unfold_all")
# What the weights do not say of a model.
SHAPE = ("model_type", "num_attention_heads", "rope_parameters", "rope_scaling", "rope_theta", "no_rope_layers", "rms_norm_eps")


def identity_of(model) -> Identity:
    """Fingerprints of a model and of how it reads parts."""
    settings = GistSettings.of(model.config)
    names = (*READING, *RECALLING) if settings.recall == "all" else READING
    how = [(name, getattr(settings, name)) for name in names] + [(name, getattr(model.config, name, None)) for name in SHAPE]
    words = settings.word_starts
    if not settings.word_aware:  # else told by the bitmap, as in parts from before there was a choice
        how, words = [*how, ("word_aware", False)], ""
    return Identity.of(model.named_parameters(), how, (words, settings.token_ids))


def part_of(identity: Identity, ids: list[int], sequence: GistSequence) -> Part:
    """Of a sequence that was read and closed. ids: its raw tokens."""
    layers, counts = [sequence.layers[i] for i in sorted(sequence.layers)], sequence.outline.counts
    held = lambda s, n: torch.stack([torch.stack([layer[s].keys[:, :n], layer[s].values[:, :n]]) for layer in layers], 1)
    return Part(identity, ids, PartShape.of(sequence.outline), tuple(held(s, n) for s, n in enumerate(counts)))


@torch.no_grad()
def join(model, parts: Sequence[Part], prefix: list[int]) -> tuple[GistSequence, list[int]]:
    """A sequence of a prefix, parts and their links; only prefix and links pass through the model.

    Returns:
        The sequence, and its raw tokens and links in their order.

    Raises:
        ValueError: another model read a part, or all of them take more positions than the model is meant for.
    """
    settings, shapes = GistSettings.of(model.config), [part.shape for part in parts]
    links = [*settings.link_ids] * len(parts)
    most = model.config.max_position_embeddings
    check_parts(model.gist_identity(), parts, len(prefix) + len(links), most, "max_position_embeddings")
    outline = JoinedOutline(settings, len(prefix), shapes, len(settings.link_ids), model.device)
    sequence = GistSequence(settings, model.device, outline)
    if prefix:
        _read(model, sequence, prefix, outline.prefix_sight(0, len(prefix)))
    for s in range(settings.levels + 1):
        order, here, there = outline.gather(shapes, s)
        if order:
            cos, sin = _turn(model, here, there)
        for index, layer in enumerate(model.model.layers if order else ()):
            keys, values = side_by_side(parts, order, s, index).to(model.device)
            if getattr(layer.self_attn, "use_rope", True):
                a, b = keys.to(cos.dtype).chunk(2, -1)
                keys = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(keys.dtype)
            sequence.layer(index)[s].put(len(prefix) if s == settings.levels else 0, keys, values)
    if links:
        _read(model, sequence, links, outline.read_links(len(links)))
    sequence.closed_at = outline.counts[-1]
    return sequence, [*prefix, *(token for part in parts for token in part.ids), *links]


def _read(model, sequence: GistSequence, ids: list[int], sight: Sight) -> None:
    """Tokens that do not recall pass through the layers, which keep their keys and values."""
    model.model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=sight.position[None],
        use_cache=False,
        gist_pass=GistPass([(sequence, sight)], None, keep=True),
    )


def _turn(model, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Factors that turn keys rotated for the positions ``here`` into those of ``there``, both [n]: two [n, D / 2]."""
    wide = torch.promote_types(model.dtype, torch.float32)
    like = torch.empty(0, dtype=wide, device=model.device)
    rotary = lambda position: model.model.rotary_emb(like, position[None].to(model.device))
    pairs = [tuple(x[0].chunk(2, -1)[0] for x in rotary(position)) for position in (here, there)]
    return turning(*pairs, wide)
