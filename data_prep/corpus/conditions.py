"""Conditions on a row's fields: `--where lang=en --where score>=0.5`."""

import math
import re
from dataclasses import dataclass

from unfold.data_prep.corpus.fields import reach
from unfold.data_prep.errors import DataError

PATTERN = re.compile(r"^([\w.\-]+)\s*(>=|<=|!=|=|>|<)\s*(.*)$", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """KEY OPERATOR VALUE; the key may be dotted (`meta.lang`)."""

    key: str
    operator: str  # "=" | "!=" | ">" | ">=" | "<" | "<="
    value: str

    def __str__(self) -> str:
        return f"{self.key}{self.operator}{self.value}"

    def holds(self, row: dict) -> bool:
        """Whether a row satisfies it. A field that is missing or null satisfies only '!='.

        Raises:
            ValueError: an order is asked for of something that is no number.
        """
        found = reach(row, self.key)[1]
        if found is None:
            return self.operator == "!="
        if self.operator in ("=", "!="):
            return (_plain(found) == self.value) == (self.operator == "=")
        try:
            number, bound = float(found), float(self.value)
        except (TypeError, ValueError):
            raise ValueError(f"--where {self}: {self.key!r} is {found!r}, which is not a number") from None
        return {">": number > bound, ">=": number >= bound, "<": number < bound, "<=": number <= bound}[self.operator]


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_condition(text: str) -> Condition:
    """Read KEY=VALUE, KEY!=VALUE, KEY>=NUMBER, ..

    Raises:
        DataError: it is none of these.
    """
    found = PATTERN.match(text)
    if not found:
        raise DataError(f"--where {text}: not a condition; write KEY=VALUE, KEY!=VALUE, KEY>=NUMBER, KEY<NUMBER ..")
    condition = Condition(*found.groups())
    if condition.operator not in ("=", "!="):
        try:
            if not math.isfinite(float(condition.value)):
                raise ValueError("no order")
        except ValueError:
            raise DataError(f"--where {text}: {condition.value!r} is not a number") from None
    return condition
