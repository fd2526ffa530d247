"""What a run directory says of its run, read for the report: metrics, configuration, checkpoints, figures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from unfold.model.config import ModelConfig
from unfold.pretrain.config import RunConfig, parse_saved
from unfold.pretrain.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """One directory under ``checkpoints/``: its step, its bytes on disk and what is wrong with it ('' for nothing)."""

    step: int
    bytes: int
    defect: str


@dataclass(frozen=True)
class Run:
    """A run as its directory shows it.

    Attributes:
        directory: the run directory.
        name: what the report calls it; unique in a report.
        config: the resolved configuration.
        metrics: {key: float64 [steps]}, one entry per line of metrics.jsonl, NaN where a line lacks the key; ordered by step.
        damaged_lines: lines of metrics.jsonl, a torn last one aside, that could not be read.
        checkpoints: by step.
        unigram_entropy: of the training shards in nats per token, None when their sidecars cannot be read.
    """

    directory: Path
    name: str
    config: RunConfig
    metrics: dict[str, np.ndarray]
    damaged_lines: int
    checkpoints: list[Checkpoint]
    unigram_entropy: float | None

    @cached_property
    def hours(self) -> np.ndarray | None:
        """Training time up to and with each step, validations and checkpoints aside; None when steps were not timed."""
        seconds = self.metrics.get("seconds")
        return None if seconds is None or np.isnan(seconds).any() else np.cumsum(seconds) / 3600

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.metrics["step"][-1])

    def last(self, key: str) -> float | None:
        """The newest finite value of a metric."""
        values = self.finite(key)
        return float(values[-1]) if len(values) else None

    def median(self, key: str) -> float | None:
        """The median of a metric's finite values."""
        values = self.finite(key)
        return float(np.median(values)) if len(values) else None

    def best(self, key: str) -> tuple[float, int] | None:
        """The smallest finite value of a metric and its step."""
        values = self.metrics.get(key)
        if values is None or not np.isfinite(values).any():
            return None
        at = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
        return float(values[at]), int(self.metrics["step"][at])

    def finite(self, key: str) -> np.ndarray:
        """The finite values of a metric, in the order of the steps."""
        values = self.metrics.get(key, np.empty(0))
        return values[np.isfinite(values)]


def read_runs(directories: list[Path]) -> list[Run]:
    """Read run directories; the same one given twice counts once.

    Raises:
        UserError: none given, one is not a run directory, has no metrics yet, or a damaged configuration.
    """
    unique = list({path.resolve(): path for path in directories}.values())
    if not unique:
        raise UserError("report: no run directory given")
    return [_read_run(path, name) for path, name in zip(unique, _names(unique))]


def _names(directories: list[Path]) -> list[str]:
    """The shortest path endings that tell the directories apart."""
    parts = [path.resolve().parts for path in directories]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("resolved paths differ")


def _read_run(directory: Path, name: str) -> Run:
    if not directory.is_dir():
        raise UserError(f"{directory}: {'is a file' if directory.exists() else 'does not exist'}; give a run directory")
    config = _read_config(directory)
    metrics, damaged = _read_metrics(directory / "metrics.jsonl")
    return Run(directory, name, config, metrics, damaged, _read_checkpoints(directory), _unigram_entropy(config.data.train))


def _read_config(directory: Path) -> RunConfig:
    path = directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"{directory}: is not a run directory (it has no config.yaml)")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or "not text"
        raise UserError(f"{path}: is damaged ({reason}); restore it from the manifest of a checkpoint") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is damaged (it holds no sections); restore it from the manifest of a checkpoint")
    return parse_saved(tree, str(path))


def _read_metrics(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """Metrics by key, and how many lines were damaged. A step written twice counts as it was written last."""
    try:
        lines = path.read_text(errors="replace").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path.parent}: has no metrics yet (no metrics.jsonl); the run has not done its first step") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows, damaged = {}, 0
    for number, text in enumerate(lines):
        if not text.strip():
            continue
        row = _parse_line(text)
        if row is not None:
            rows[row["step"]] = row
        elif number < len(lines) - 1:  # a line without its line feed was torn by a kill: nothing is wrong with the file
            damaged += 1
    if not rows:
        raise UserError(f"{path.parent}: has no metrics yet (metrics.jsonl holds no whole line)")
    ordered = [rows[step] for step in sorted(rows)]
    keys = {key: None for row in ordered for key in row}  # a set that keeps the order
    return {key: np.array([row.get(key, math.nan) for row in ordered]) for key in keys}, damaged


def _parse_line(text: str) -> dict[str, float] | None:
    """The numbers of a line; None when it is damaged. Numbers in lists and objects get dotted keys."""
    try:
        line = json.loads(text)
        row = _numbers(line) if isinstance(line, dict) else {}
        return row if math.isfinite(row["step"]) else None
    except (ValueError, KeyError, RecursionError):
        return None


def _numbers(line: dict, prefix: str = "") -> dict[str, float]:
    row = {}
    for key, value in line.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            row[prefix + key] = float(value)
        elif isinstance(value, dict):
            row.update(_numbers(value, f"{prefix}{key}."))
        elif isinstance(value, list):
            row.update(_numbers({str(i): v for i, v in enumerate(value)}, f"{prefix}{key}."))
    return row


def _read_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Sizes are compared with the manifest, contents are not: a checkpoint may be hundreds of gigabytes."""
    found = []
    for directory in sorted((run_dir / "checkpoints").glob("step-*")):
        try:
            step = int(directory.name.removeprefix("step-"))
            sizes = {p.name: p.stat().st_size for p in directory.iterdir() if p.is_file()}
        except (ValueError, OSError):
            continue
        found.append(Checkpoint(step, sum(sizes.values()), _checkpoint_defect(directory, sizes)))
    return sorted(found, key=lambda c: c.step)


def _checkpoint_defect(directory: Path, sizes: dict[str, int]) -> str:
    if "manifest.json" not in sizes:
        return "not finished (no manifest)"
    try:
        files = json.loads((directory / "manifest.json").read_text())["files"]
        expected = {name: entry["bytes"] for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest damaged"
    wrong = [name for name, size in expected.items() if sizes.get(name) != size]
    return f"{wrong[0]} is {'cut short or altered' if wrong[0] in sizes else 'missing'}" if wrong else ""


def _unigram_entropy(prefixes: tuple[str, ...]) -> float | None:
    """Of the shards by their sidecars; for several, the mean weighted by their tokens."""
    total = weighted = 0.0
    for prefix in prefixes:
        try:
            sidecar = json.loads(Path(f"{prefix}.json").read_text())
            tokens, entropy = float(sidecar["tokens"]), float(sidecar["unigram_entropy_nats"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        total, weighted = total + tokens, weighted + tokens * entropy
    return weighted / total if total > 0 and math.isfinite(weighted) else None


def parameters(model: ModelConfig) -> int | None:
    """Weights of the model, embedding rows of the padding included; None when the vocabulary is not known."""
    if not model.vocab_size:
        return None
    embedding = model.padded_vocab_size * model.hidden_size
    attention = (2 * model.heads + 2 * model.kv_heads) * model.head_dim * model.hidden_size  # query, key, value, output
    biases = {
        "qkv_bias": (model.heads + 2 * model.kv_heads) * model.head_dim,
        "output_bias": model.hidden_size,
        "mlp_bias": 2 * model.ffn_size + model.hidden_size,
        "qk_norm": 2 * model.head_dim,
    }
    vectors = 2 * model.hidden_size + sum(size for part, size in biases.items() if getattr(model, part))
    layer = attention + 3 * model.ffn_size * model.hidden_size + vectors
    return embedding * (1 if model.tied_embeddings else 2) + model.layers * layer + model.hidden_size
