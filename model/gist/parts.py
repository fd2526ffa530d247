"""Parts: documents that a model read by themselves, once, and that can be joined in any order (docs/method.md#linked-contexts).

One code for generation and for exported models, with which this file is shipped: it needs torch and safetensors alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unfold.model.gist.joining import PartShape

FORMAT = "unfold part 1"
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DIGESTED = 1 << 22  # numbers at a time


@dataclass(frozen=True)
class Identity:
    """Who read a part, as fingerprints.

    Attributes:
        model: of the weights, their configuration and how tokens are folded.
        tokenizer: of what the vocabulary's ids stand for, as far as reading needs it.
    """

    model: str
    tokenizer: str

    @classmethod
    def of(cls, weights: Iterable[tuple[str, Tensor]], model: object, tokenizer: object) -> Identity:
        """weights: by name, every bit of them counts; model, tokenizer: what else belongs to each, told apart by their texts."""
        text = lambda x: hashlib.sha256(repr(x).encode()).hexdigest()
        return cls(text((model, digest(weights))), text(tokenizer))

    def of_tokens(self, tokens: Sequence[int]) -> str:
        """A name for what these readers make of a text."""
        return hashlib.sha256(f"{self.model} {self.tokenizer} {list(tokens)}".encode()).hexdigest()

    def check(self, other: Identity, name: str) -> None:
        """Raise ValueError where others read a part."""
        for what in ("model", "tokenizer"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if ours != theirs:
                raise ValueError(
                    f"part {name}: was read by another {what} (fingerprint {theirs[:12]}, this one's is {ours[:12]}); "
                    "read its document again"
                )


@torch.no_grad()
def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A fingerprint of named tensors, computed where they lie: sums of their bits, plain and weighted by place."""
    total = hashlib.sha256()
    for name, weight in weights:
        bits = weight.detach().contiguous().view(BITS[weight.element_size()]).flatten()
        sums = [torch.zeros(2, dtype=torch.int64, device=bits.device)]
        for run in bits.split(DIGESTED):
            run = run.long()
            sums.append(torch.stack([run.sum(), (run * torch.arange(1, len(run) + 1, device=run.device)).sum()]))
        total.update(f"{name} {tuple(weight.shape)} {weight.dtype} {torch.stack(sums).tolist()}".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Part:
    """A document as a model read it, from position 0 on, closed with a gist at every level.

    Attributes:
        identity: who read it.
        ids: its raw tokens.
        shape: its outline.
        rows: of each segment (gists of the top level first, raw tokens last) its items' keys, rotated for their positions in the
            part, and values: [2, layers that keep them, Hkv, items, D].
    """

    identity: Identity
    ids: list[int]
    shape: PartShape
    rows: tuple[Tensor, ...]

    @property
    def raw(self) -> int:
        """Raw tokens."""
        return len(self.ids)

    def __len__(self) -> int:
        """Tokens, gists included."""
        return sum(self.shape.counts)

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return sum(rows.nbytes for rows in self.rows)

    def to(self, device: torch.device, raw_on_host: bool = False) -> Part:
        """Keys and values on a device, those of raw tokens in host memory if asked for (pinned, for a GPU)."""
        *gists, raw = self.rows
        if raw_on_host:
            raw = raw.cpu()
            raw = raw.pin_memory() if device.type == "cuda" and not raw.is_pinned() else raw
        else:
            raw = raw.to(device)
        return replace(self, rows=(*(rows.to(device) for rows in gists), raw))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all. Raises OSError where it cannot be written."""
        path = Path(path)
        tensors = {f"rows.{s}": rows.contiguous() for s, rows in enumerate(self.rows)}
        tensors |= {f"ends.{s}": ends for s, ends in enumerate(self.shape.ends)} | {"ids": torch.tensor(self.ids)}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        said = {"format": FORMAT, "model": self.identity.model, "tokenizer": self.identity.tokenizer}
        try:
            save_file(tensors, partial, said)
            os.replace(partial, path)
        except SafetensorError as error:  # a full disk, a directory that is gone
            raise OSError(f"part {path}: cannot be written ({error})") from None
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, identity: Identity) -> Part:
        """Read a file that :meth:`save` wrote; its rows are on the CPU.

        Raises:
            ValueError: it is no such file, or another model or tokenizer read the part.
        """
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                if said.get("format") != FORMAT:
                    raise ValueError(f"part {path}: is not a part (format {said.get('format')!r}, expected {FORMAT!r})")
                identity.check(Identity(said.get("model", ""), said.get("tokenizer", "")), str(path))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"part {path}: cannot be read ({error}); remove it, and read its document again") from None
        ends = tuple(tensors[f"ends.{s}"] for s in range(sum(name.startswith("ends.") for name in tensors)))
        rows = tuple(tensors[f"rows.{s}"] for s in range(len(ends) + 1))
        shape = PartShape(tuple(r.shape[3] for r in rows), ends)
        return cls(identity, tensors["ids"].tolist(), shape, rows)


def check_parts(identity: Identity, parts: Sequence[Part], others: int, most: int, setting: str) -> None:
    """Raise ValueError for parts that cannot be joined.

    Args:
        identity: of who joins them.
        others: tokens of prefix and links.
        most: positions that the model is meant for, by the setting of this name.
    """
    for number, part in enumerate(parts):
        identity.check(part.identity, f"number {number}")
    length = others + sum(part.raw for part in parts)
    if length > most:
        raise ValueError(
            f"parts: {len(parts)} of them take {length} positions with prefix and links, but the model is meant for {most} "
            f"({setting}); join fewer"
        )


def turning(here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotary factors that turn keys which have been rotated by the factors ``here`` into those rotated by ``there``.

    The quotient of the factors, as complex numbers: so it undoes exactly what was applied, rounding of the angles included,
    whatever the frequencies and their magnitude are.

    Args:
        here, there: (cosines, sines) of any one shape.
        dtype: of the result, (cosines, sines).
    """
    (cos, sin), (to_cos, to_sin) = ([x.double() for x in pair] for pair in (here, there))
    square = cos.square() + sin.square()
    return ((to_cos * cos + to_sin * sin) / square).to(dtype), ((to_sin * cos - to_cos * sin) / square).to(dtype)


def side_by_side(parts: Sequence[Part], order: Sequence[tuple[int, slice]], segment: int, layer: int) -> Tensor:
    """Keys and values of items of several parts in a layer that keeps them, [2, Hkv, items, D]; order: (part, its items)."""
    return torch.cat([parts[i].rows[segment][:, layer, :, items] for i, items in order], 2)
