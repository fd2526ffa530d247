"""What of the configuration says which parameters are trained, and how fast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from unfold.model.settings import NotNegative, Settings, option

GISTS = "gists"  # in place of a pattern: the rows of gist and link ids
ROWS = ("embedding.rows", "head.rows")  # canonical names of those rows, where they are parameters of their own


@dataclass(frozen=True)
class RateConfig(Settings):
    """A learning rate of its own for some parameters: it follows the schedule of all the others, times a factor."""

    match: tuple[str, ...] = option((), "patterns of canonical parameter names, or `gists`, as in train.trainable")
    factor: NotNegative = option(1.0, "times the learning rate of the step")

    def __post_init__(self):
        object.__setattr__(self, "match", tuple(self.match))
        super().__post_init__()

    def misfits(self) -> list[str]:
        if not self.match:
            return ["match: empty; name at least one pattern, e.g. gists"]
        return [f"match: {text}" for text in pattern_errors(self.match)]


def pattern_errors(patterns: Iterable[str]) -> list[str]:
    """What is wrong with patterns by themselves."""
    return [f"{pattern!r} is no pattern" for pattern in patterns if not pattern.removeprefix("!").strip()]


def hits(pattern: str, name: str) -> bool:
    """Whether a pattern, without its exclamation mark, means a parameter of this canonical name."""
    return name in ROWS if pattern == GISTS else fnmatchcase(name, pattern)


def chosen(patterns: Sequence[str], name: str) -> bool:
    """Whether patterns take a parameter in: the last one that means it decides; beginning with !, they begin with everything."""
    result = bool(patterns) and patterns[0].startswith("!")
    for pattern in patterns:
        if hits(pattern.removeprefix("!"), name):
            result = not pattern.startswith("!")
    return result
