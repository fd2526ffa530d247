"""Parts: documents that an exported model reads by themselves, once, and joins in any order. Shipped with exports."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unfold.model.gist.growing import Sight
from unfold.model.gist.joining import JoinedOutline, PartShape, digest

from .gist_attention import GistPass
from .gist_sequence import GistSequence, GistSettings

FORMAT = "gist part 1"
READING = ("chunk_sizes", "sink", "n_prev", "own_group", "token_ids", "word_starts")  # settings by which a part is read
RECALLING = ("recall_from", "topk", "top_p", "budget_ratio", "share", "unfold_all")  # and those by which its tokens recall


@dataclass(frozen=True)
class GistPart:
    """A document as a model read it, from position 0 on, closed with a gist at every level.

    Attributes:
        identity: fingerprint of the model, and of how it puts gists in.
        input_ids: its raw tokens.
        shape: its outline.
        rows: of each segment (gists of the top level first, raw tokens last) its items' keys, rotated for their positions in the
            part, and values: [2, layers, Hkv, items, D].
    """

    identity: str
    input_ids: list[int]
    shape: PartShape
    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, identity: str, input_ids: list[int], sequence: GistSequence) -> GistPart:
        """Of a sequence that was read and closed."""
        layers, counts = [sequence.layers[i] for i in sorted(sequence.layers)], sequence.outline.counts
        held = lambda s, n: torch.stack([torch.stack([layer[s].keys[:, :n], layer[s].values[:, :n]]) for layer in layers], 1)
        return cls(identity, input_ids, PartShape.of(sequence.outline), tuple(held(s, n) for s, n in enumerate(counts)))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        path = Path(path)
        tensors = {f"rows.{s}": rows.contiguous() for s, rows in enumerate(self.rows)}
        tensors |= {f"ends.{s}": ends for s, ends in enumerate(self.shape.ends)} | {"input_ids": torch.tensor(self.input_ids)}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        save_file(tensors, partial, {"format": FORMAT, "identity": self.identity})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path, model) -> GistPart:
        """Read what :meth:`save` wrote. Raises ValueError for any other file, and for a part that another model read."""
        try:
            with safe_open(path, "pt", device=str(model.device)) as file:
                said = file.metadata() or {}
                if said.get("format") != FORMAT:
                    raise ValueError(f"part {path}: is not a part (format {said.get('format')!r}, expected {FORMAT!r})")
                check(model.gist_identity(), said.get("identity", ""), str(path))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"part {path}: cannot be read ({error}); read its document again") from None
        ends = tuple(tensors[f"ends.{s}"] for s in range(sum(name.startswith("ends.") for name in tensors)))
        rows = tuple(tensors[f"rows.{s}"] for s in range(len(ends) + 1))
        shape = PartShape(tuple(r.shape[3] for r in rows), ends)
        return cls(said["identity"], tensors["input_ids"].tolist(), shape, rows)


def check(own: str, other: str, name: str) -> None:
    """Raise ValueError where another model read a part."""
    if own != other:
        raise ValueError(
            f"part {name}: was read by another model, or with other gists (fingerprint {other[:12]}, this one's is {own[:12]}); "
            "read its document again"
        )


def identity_of(model) -> str:
    """A fingerprint of a model and of how it reads parts."""
    settings = GistSettings.of(model.config)
    names = (*READING, *RECALLING) if settings.recall == "all" else READING
    how = [(name, getattr(settings, name)) for name in names]
    positions = [(name, getattr(model.config, name, None)) for name in ("rope_parameters", "rope_scaling", "rope_theta")]
    return hashlib.sha256(f"{how} {positions} {digest(model.named_parameters())}".encode()).hexdigest()


@torch.no_grad()
def join(model, parts: Sequence[GistPart], prefix: list[int]) -> tuple[GistSequence, list[int]]:
    """A sequence of a prefix, parts and their links; only prefix and links pass through the model.

    Returns:
        The sequence, and its raw tokens and links in their order.

    Raises:
        ValueError: another model read a part, or all of them take more positions than the model is meant for.
    """
    settings, own = GistSettings.of(model.config), model.gist_identity()
    for number, part in enumerate(parts):
        check(own, part.identity, f"number {number}")
    links = [*settings.link_ids] * len(parts)
    ids = [*prefix, *(token for part in parts for token in part.input_ids), *links]
    if len(ids) > model.config.max_position_embeddings:
        raise ValueError(
            f"parts: {len(parts)} of them take {len(ids)} positions with prefix and links, but the model is meant for "
            f"{model.config.max_position_embeddings} (max_position_embeddings); join fewer"
        )
    shapes = [part.shape for part in parts]
    outline = JoinedOutline(settings, len(prefix), shapes, len(settings.link_ids), model.device)
    sequence = GistSequence(settings, model.device, outline)
    if prefix:
        _read(model, sequence, prefix, outline.prefix_sight(0, len(prefix)))
    for s in range(settings.levels + 1):
        _take_segment(model, sequence, parts, s)
    if links:
        _read(model, sequence, links, outline.read_links(len(links)))
    sequence.closed_at = outline.counts[-1]
    return sequence, ids


def _read(model, sequence: GistSequence, ids: list[int], sight: Sight) -> None:
    """Tokens that do not recall pass through the layers, which keep their keys and values."""
    model.model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=sight.position[None],
        use_cache=False,
        gist_pass=GistPass([(sequence, sight)], None, keep=True),
    )


def _take_segment(model, sequence: GistSequence, parts: Sequence[GistPart], s: int) -> None:
    """Put the parts' rows of one segment behind those of the prefix, their keys turned by the parts' offsets."""
    outline, device = sequence.outline, model.device
    order = [(i, slice(*items)) for i, *items in outline.order([part.shape for part in parts], s)]
    if not any(items.stop > items.start for _, items in order):
        return
    here = torch.cat([parts[i].shape.positions(s)[items] for i, items in order]).to(device)
    offset = torch.cat([torch.full((items.stop - items.start,), outline.offsets[i]) for i, items in order]).to(device)
    cos, sin = _turn(model, here, here + offset)
    begin = outline.prefix if s == outline.levels else 0
    for index, layer in enumerate(model.model.layers):
        keys, values = torch.cat([parts[i].rows[s][:, index, :, items] for i, items in order], 2).to(device)
        if getattr(layer.self_attn, "use_rope", True):
            a, b = keys.to(cos.dtype).chunk(2, -1)
            keys = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(keys.dtype)
        sequence.layer(index)[s].put(begin, keys, values)


def _turn(model, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Factors that turn keys rotated for the positions ``here`` into those of ``there``, both [n]: two [n, D / 2], at least fp32.

    The quotient of the model's own factors, as complex numbers: whatever its frequencies and their magnitude are.
    """
    wide = torch.promote_types(model.dtype, torch.float32)
    like = torch.empty(0, dtype=wide, device=here.device)
    (cos, sin), (to_cos, to_sin) = ([x[0].chunk(2, -1)[0].double() for x in model.model.rotary_emb(like, position[None])]
                                    for position in (here, there))  # fmt: skip
    square = cos.square() + sin.square()
    return ((to_cos * cos + to_sin * sin) / square).to(wide), ((to_sin * cos - to_cos * sin) / square).to(wide)
