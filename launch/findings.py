"""What ``launch doctor`` finds, and how it is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LEVELS = ("ok", "note", "problem")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ok; note: worth knowing; problem: must be mended.
        what: what was found.
        remedy: what to do, for notes and problems.
    """

    level: str
    what: str
    remedy: str = ""


def ok(what: str) -> Finding:
    return Finding("ok", what)


def note(what: str, remedy: str) -> Finding:
    return Finding("note", what, remedy)


def problem(what: str, remedy: str) -> Finding:
    return Finding("problem", what, remedy)


def lines(findings: Iterable[Finding]) -> list[str]:
    """Readable lines, each remedy under its finding."""
    out = []
    for finding in findings:
        out.append(f"{finding.level:>7}  {finding.what}")
        if finding.remedy:
            out.append(f"         -> {finding.remedy}")
    return out


def merged(by_node: dict[str, list[Finding]]) -> list[Finding]:
    """Findings of several nodes; what all have in common is told once."""
    nodes_of: dict[Finding, list[str]] = {}
    for node, findings in by_node.items():
        for finding in findings:
            nodes_of.setdefault(finding, []).append(node)
    named = lambda nodes: "all nodes" if len(nodes) == len(by_node) else ", ".join(nodes)
    return [Finding(f.level, f"{named(nodes)}: {f.what}", f.remedy) for f, nodes in nodes_of.items()]
