"""How a configuration is written down: fields with their documentation, choices and bounds, and what is wrong with values."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Bounds:
    """What a number may be, as part of its field's type: ``Annotated[int, Bounds(ge=1)]``.

    Pydantic does not look at it: with what a class checks of its own it is told at once, however the class is made.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def complaint(self, value: float) -> str:
        """What is wrong with a value; '' if nothing is."""
        if self.ge is not None and value < self.ge:
            return f"{value} is below {self.ge}"
        if self.gt is not None and value <= self.gt:
            return f"{value} is not above {self.gt}"
        if self.le is not None and value > self.le:
            return f"{value} is above {self.le}"
        if self.lt is not None and value >= self.lt:
            return f"{value} is not below {self.lt}"
        return ""


Count = Annotated[int, Bounds(ge=1)]
Natural = Annotated[int, Bounds(ge=0)]
Positive = Annotated[float, Bounds(gt=0)]
NotNegative = Annotated[float, Bounds(ge=0)]
Part = Annotated[float, Bounds(ge=0, le=1)]
Decay = Annotated[float, Bounds(ge=0, lt=1)]


class SettingsError(ValueError):
    """All that is wrong with some settings; each text begins with its setting's name."""

    def __init__(self, errors: Sequence[str]):
        super().__init__("; ".join(errors))
        self.errors = tuple(errors)


class Settings:
    """A configuration dataclass that checks itself whenever it is made, and tells all errors at once."""

    def __post_init__(self):
        raise_together(field_errors(self) + self.misfits())

    def misfits(self) -> list[str]:
        """What is wrong beyond single values; each text begins with a setting's name."""
        return []


def option(default, doc: str):
    """A configuration field with its documentation; the configuration page and ``--help`` are made from it."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def raise_together(errors: Sequence[str]) -> None:
    """Raise one SettingsError with every error, if there is any."""
    if errors:
        raise SettingsError(errors)


def field_errors(settings: Any) -> list[str]:
    """What is wrong with single values of a configuration dataclass, by the choices and bounds that their types state."""
    found = ((name, complaint(getattr(settings, name), hint)) for name, hint in _hints(type(settings)).items())
    return [f"{name}: {text}" for name, text in found if text]


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def complaint(value: Any, hint: Any) -> str:
    """What is wrong with a value of a field of this type; '' if nothing is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None
        return "" if value is None else complaint(value, arguments[0])
    if origin is Literal and value not in arguments:
        return choice_text(value, arguments)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    return next((bounds.complaint(value) for bounds in arguments[1:] if isinstance(bounds, Bounds)), "")


def choice_text(value: Any, choices: Sequence) -> str:
    """What is said of a value that is none of the choices."""
    return f"{value!r} is not one of {', '.join(map(str, choices))}"
