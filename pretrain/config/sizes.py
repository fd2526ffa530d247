"""Chunk sizes on a command line: ``--chunk-sizes 8,4``."""

from __future__ import annotations

from collections.abc import Sequence

from unfold.pretrain.errors import UserError


def parse_sizes(text: str) -> tuple[int, ...]:
    """``8,4`` -> (8, 4). Raises UserError."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise UserError(f"--chunk-sizes {text}: expected numbers such as 8,4") from None


def check_levels(sizes: Sequence[int], gist_ids: int, name: str) -> None:
    """Raise UserError where a model's vocabulary has fewer gists than chunk sizes have levels. name: of the model."""
    if len(sizes) > gist_ids:
        text = ",".join(map(str, sizes))
        raise UserError(f"--chunk-sizes {text}: {len(sizes)} levels, but {name} has {gist_ids} gist ids; give fewer levels")
