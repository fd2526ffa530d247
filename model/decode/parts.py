"""Parts: documents that were read by themselves, once, and are joined in any order (docs/generation.md#documents-read-once)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unfold.model.config import TRAINING_ONLY, GistConfig, ModelConfig
from unfold.model.decode.cache import SequenceCache
from unfold.model.gist.joining import JoinedOutline, PartShape, digest
from unfold.model.layers import Rotary

FORMAT = "unfold part 1"


@dataclass(frozen=True)
class Identity:
    """Who read a part.

    Attributes:
        model: of the weights, their configuration and how tokens are folded.
        tokenizer: of what the vocabulary's ids stand for, as far as reading needs it.
    """

    model: str
    tokenizer: str

    @classmethod
    def of(cls, model: nn.Module, config: ModelConfig, gist: GistConfig, gist_ids: Sequence[int], word_starts: np.ndarray):
        """Of a model on one rank; every bit of its weights counts."""
        folding = {k: v for k, v in asdict(gist).items() if k not in {*TRAINING_ONLY, "links"}}
        if gist.recall != "all":  # then no token of a part recalls, and what others select says nothing of it
            for name in ("recall", "topk", "top_p", "budget_ratio", "share", "unfold_all", "recall_from"):
                folding.pop(name)
        weights = hashlib.sha256(f"{asdict(config)} {folding} {digest(model.named_parameters())}".encode())
        words = hashlib.sha256(np.packbits(np.asarray(word_starts, bool)).tobytes())
        words.update(repr((len(word_starts), list(gist_ids[: gist.levels]))).encode())
        return cls(weights.hexdigest(), words.hexdigest())

    def of_tokens(self, tokens: Sequence[int]) -> str:
        """A name for what these readers make of a text."""
        return hashlib.sha256(f"{self.model} {self.tokenizer} {list(tokens)}".encode()).hexdigest()


@dataclass(frozen=True)
class Part:
    """A document as a model read it, from position 0 on, closed with a gist at every level.

    Attributes:
        identity: who read it.
        ids, level: its interleaved tokens: vocabulary ids, levels (-1 is raw).
        shape: its outline.
        rows: of each segment (gists of the top level first, raw tokens last) its items' keys, rotated for their positions in the
            part, and values: [2, layers, Hkv, items, D].
    """

    identity: Identity
    ids: list[int]
    level: list[int]
    shape: PartShape
    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, identity: Identity, ids: list[int], level: list[int], cache: SequenceCache) -> Part:
        """Of a sequence that was read and closed."""
        held = [torch.stack([layer[s].buffer.rows for layer in cache.layers], 1) for s in range(len(cache.outline.counts))]
        return cls(identity, list(ids), list(level), PartShape.of(cache.outline), tuple(held))

    @property
    def raw(self) -> int:
        """Raw tokens."""
        return self.shape.raw

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return sum(rows.nbytes for rows in self.rows)

    def to(self, device: torch.device, raw_on_host: bool) -> Part:
        """Keys and values on a device, those of raw tokens in host memory if asked for (pinned, for a GPU)."""
        *gists, raw = self.rows
        if raw_on_host:
            raw = raw.cpu()
            raw = raw.pin_memory() if device.type == "cuda" and not raw.is_pinned() else raw
        else:
            raw = raw.to(device)
        return replace(self, rows=(*(rows.to(device) for rows in gists), raw))

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {f"rows.{s}": rows.contiguous() for s, rows in enumerate(self.rows)}
        tensors |= {f"ends.{s}": ends for s, ends in enumerate(self.shape.ends)}
        tensors |= {"ids": torch.tensor(self.ids), "level": torch.tensor(self.level, dtype=torch.int8)}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        save_file(tensors, partial, {"format": FORMAT, "model": self.identity.model, "tokenizer": self.identity.tokenizer})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, identity: Identity) -> Part:
        """Read a file that :meth:`save` wrote; its rows are on the CPU.

        Raises:
            ValueError: it is no such file, or another model or tokenizer read the part.
        """
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                if said.get("format") != FORMAT:
                    raise ValueError(f"part {path}: is not a part (format {said.get('format')!r}, expected {FORMAT!r})")
                check(identity, Identity(said.get("model", ""), said.get("tokenizer", "")), str(path))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"part {path}: cannot be read ({error}); remove it, and read its document again") from None
        ends = tuple(tensors[f"ends.{s}"] for s in range(sum(name.startswith("ends.") for name in tensors)))
        rows = tuple(tensors[f"rows.{s}"] for s in range(len(ends) + 1))
        shape = PartShape(tuple(r.shape[3] for r in rows), ends)
        return cls(identity, tensors["ids"].tolist(), tensors["level"].tolist(), shape, rows)


def check(own: Identity, other: Identity, name: str) -> None:
    """Raise ValueError where others read a part."""
    for what in ("model", "tokenizer"):
        ours, theirs = getattr(own, what), getattr(other, what)
        if ours != theirs:
            raise ValueError(
                f"part {name}: was read by another {what} (fingerprint {theirs[:12]}, this one's is {ours[:12]}); "
                "read its document again"
            )


@torch.no_grad()
def join(cache: SequenceCache, parts: Sequence[Part], config: ModelConfig) -> None:
    """Put the parts' keys and values into a cache that holds its prefix alone: keys turned by their parts' offsets.

    cache: its outline is a JoinedOutline of the parts, in their order.
    """
    outline: JoinedOutline = cache.outline
    shapes = [part.shape for part in parts]
    for s in range(outline.levels + 1):
        order = [(i, slice(first, last)) for i, first, last in outline.order(shapes, s) if last > first]
        if not order:
            continue
        here = torch.cat([shapes[i].positions(s)[items] for i, items in order])
        offset = torch.cat([torch.full((items.stop - items.start,), outline.offsets[i]) for i, items in order])
        turn = Rotary.turning(*(x.to(cache.layers[0][s].device) for x in (here, here + offset)), config, parts[0].rows[s].dtype)
        for index, layer in enumerate(cache.layers):
            rows = torch.cat([parts[i].rows[s][:, index, :, items] for i, items in order], 2).to(turn.cos.device)
            keys = rows[0] if index in config.nope_layers else turn.apply(rows[0])
            layer[s].put(keys, rows[1])
