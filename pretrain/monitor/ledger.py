"""Reading what the time of a run went to (:mod:`unfold.pretrain.monitor.goodput` writes it); loads nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

LEDGER = "goodput.json"
PARTS = ("training", "data", "startup", "validation", "saving", "evaluation", "rollback", "lost", "down", "other")


def read_ledger(run_dir: Path) -> dict | None:
    """What the ledger says; None where there is none, or a damaged one."""
    try:
        ledger = json.loads((run_dir / LEDGER).read_text())
        numbers = [ledger["began"], ledger["seen"], ledger["starts"], *ledger["spent"].values()]
        return ledger if all(isinstance(x, int | float) for x in numbers) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def shares(spent: dict[str, float]) -> dict[str, float]:
    """{part: share of the time since the first start}, parts of less than one in a thousand left out."""
    whole = sum(spent.values()) or 1.0
    return {part: seconds / whole for part, seconds in spent.items() if seconds >= whole / 1000}


WORDS = {"data": "waiting for data", "startup": "starting", "lost": "work that was lost", "down": "not running"}


def in_words(spent: dict[str, float]) -> str:
    """82.0 % of the time trained; starting 5.1 %, .."""
    parts = shares(spent)
    rest = sorted(((share, part) for part, share in parts.items() if part != "training"), reverse=True)
    told = ", ".join(f"{WORDS.get(part, part)} {100 * share:.1f} %" for share, part in rest)
    return f"{100 * parts.get('training', 0.0):.1f} % of the time trained" + (f"; {told}" if told else "")
