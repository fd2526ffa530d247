"""What a model is: frozen dataclasses that check themselves and report everything that is wrong at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod


def option(default, doc: str):
    """A configuration field with its documentation; the configuration page and ``--help`` are made from it."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class GistConfig:
    """How tokens are folded into gists, and how much of what was folded is recalled (METHOD.md)."""

    chunk_sizes: tuple[int, ...] = option((8, 4), "raw tokens per level-0 gist, level-0 gists per level-1 gist, ..")
    sink: int = option(3, "first raw tokens of a document that every later token sees")
    n_prev: int = option(1, "closed neighbour groups that stay visible at every level")
    recall: str = option("none", "which queries unfold chunks: none")

    def __post_init__(self):
        object.__setattr__(self, "chunk_sizes", tuple(self.chunk_sizes))
        errors = []
        if not self.chunk_sizes:
            errors.append("chunk_sizes: empty; give one size per gist level, e.g. (8, 4)")
        if any(c < 1 for c in self.chunk_sizes):
            errors.append(f"chunk_sizes: {list(self.chunk_sizes)} has a size below 1")
        if self.sink < 0:
            errors.append(f"sink: {self.sink} is below 0")
        if self.n_prev < 0:
            errors.append(f"n_prev: {self.n_prev} is below 0")
        if self.recall not in ("none",):
            errors.append(f"recall: {self.recall!r} is not one of none")
        raise_together(errors)

    @property
    def levels(self) -> int:
        """Number of gist levels."""
        return len(self.chunk_sizes)

    @property
    def ratio(self) -> int:
        """Compression ratio: raw tokens per top-level gist."""
        return prod(self.chunk_sizes)


def raise_together(errors: list[str]) -> None:
    """Raise one ValueError that lists every error, if there is any."""
    if errors:
        raise ValueError("; ".join(errors))
