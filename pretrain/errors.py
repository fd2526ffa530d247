"""The error that a user sees as one line, without a traceback; and the numbers of a command line that end in one."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

MOST = 10**15  # no count, size or rate of this program comes near


class UserError(Exception):
    """Something that the user can mend; its message names the setting, file or value, and what would do."""


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for a number of the command line that is not finite or beyond any sense, naming its flag."""
    for name, value in _numbers(args):
        flag = f"--{name.replace('_', '-')}"
        if not math.isfinite(value):
            raise UserError(f"{flag} {value}: is not a finite number")
        if abs(value) > MOST:
            raise UserError(f"{flag} {value}: is beyond any sense (at most {MOST:.0e})")


def _numbers(args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    for name, value in vars(args).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield name, number
