"""Numbers that cannot be meant: infinite ones, truth values, and those beyond any use. Of flags: unfold.pretrain.errors."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from fractions import Fraction

from unfold.pretrain.errors import MOST

MOST_REPEATS = 64  # of a document in an epoch
# What is finite and still out of any sense, by the end of a setting's name: (highest, in words).
HIGHEST = (
    ("_minutes", 10 * 365 * 24 * 60, "ten years"),
    (".lr", 10, "10"),
    ("optimizer.muon_lr", 10, "10"),
    ("optimizer.weight_decay", 100, "100"),
    ("optimizer.eps", 1, "1"),
)


def setting_errors(tree: dict, kind: type, prefix: str = "") -> list[str]:
    """What is wrong with the numbers of a configuration's tree, before it becomes ``kind``; one readable line each."""
    errors = []
    for name, hint in typing.get_type_hints(kind).items():
        if name not in tree:
            continue
        value, key = tree[name], f"{prefix}{name}"
        if section := section_of(hint):
            errors += setting_errors(value, section, f"{key}.") if isinstance(value, dict) else []
            continue
        if dataclasses.is_dataclass(item := listed(hint)):
            for i, one in enumerate(value if isinstance(value, list | tuple) else []):
                errors += setting_errors(one, item, f"{key}.{i}.") if isinstance(one, dict) else []
            continue
        wanted = _types(hint)
        if not wanted & {int, float}:
            continue
        for number in _flat(value):
            if problem := _problem(number, key, bool in wanted):
                errors.append(f"{key}: {problem}")
    return errors


def whole_weights(weights: Sequence[tuple[int, float]]) -> list[int]:
    """The smallest whole numbers in proportion to 1, of documents below the first length, and to the weights of the others.

    weights: (tokens, weight) by rising tokens. Raises ValueError where none up to MOST_REPEATS are, to within 1 %.
    """
    parts = [Fraction(w).limit_denominator(MOST_REPEATS) for w in (1.0, *(weight for _, weight in weights))]
    scale = math.lcm(*(part.denominator for part in parts))
    times = [int(part * scale) for part in parts]
    used = times[1:] if weights[0][0] == 0 else times
    rounded = any(abs(part - Fraction(w)) * 100 > Fraction(w) for part, (_, w) in zip(parts[1:], weights))
    if rounded or min(used) < 1 or max(used) // math.gcd(*used) > MOST_REPEATS:
        raise ValueError(f"are no whole numbers up to {MOST_REPEATS} in proportion; take such as 1.5, 2 or 4")
    return [n // math.gcd(*used) for n in times]


def section_of(hint: object) -> type | None:
    """The configuration class that a setting is, or may be; None where it is a value."""
    kinds = [hint, *typing.get_args(hint)] if isinstance(hint, types.UnionType) else [hint]
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def listed(hint: object) -> object:
    """What a list of any length is of; None where the hint is another."""
    arguments = typing.get_args(hint)
    return arguments[0] if typing.get_origin(hint) is tuple and arguments[-1] is Ellipsis else None


def _flat(value: object) -> list:
    """What stands in a value, in lists of lists too."""
    return [x for part in value for x in _flat(part)] if isinstance(value, list | tuple) else [value]


def _problem(value: object, key: str, may_be_bool: bool) -> str:
    if isinstance(value, bool):
        return "" if may_be_bool else f"{str(value).lower()} is no number"
    if isinstance(value, str):  # which pydantic would make a number of
        try:
            value = float(value)
        except ValueError:
            return ""
    if not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return f"{value} is not a finite number"
    highest, words = next(((high, text) for end, high, text in HIGHEST if key.endswith(end)), (MOST, f"{MOST:.0e}"))
    return f"{value} is beyond any sense (at most {words})" if abs(value) > highest else ""


def _types(hint: object) -> set[type]:
    """The plain types in a type hint."""
    if typing.get_origin(hint) in (tuple, list, typing.Union, types.UnionType):
        return set().union(*(_types(argument) for argument in typing.get_args(hint)))
    return {hint} if isinstance(hint, type) else set()
