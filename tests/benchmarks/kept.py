"""What an experiment of many trainings has reached so far: a run that was cut off goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unfold.model.transformer import Transformer
from unfold.pretrain.errors import UserError


class Kept:
    """One file per seed, chunk sizes and way, with the settings that they were made with; dense models beside them.

    Raises:
        UserError: what lies there was made with other settings.
    """

    def __init__(self, directory: Path, plan: Any):
        """plan: a dataclass, all settings that outcomes depend on."""
        self._runs = directory / "runs"
        self._plan = json.loads(json.dumps(dataclasses.asdict(plan)))
        self._runs.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._runs.glob("*.json")):
            if json.loads(path.read_text())["plan"] != self._plan:
                raise UserError(f"{path}: was made with other settings; take another --output, or the same options")

    def _path(self, seed: int, chunk_sizes: tuple[int, ...], way: str) -> Path:
        structure = f"{'x'.join(map(str, chunk_sizes))}-" if chunk_sizes else ""
        return self._runs / f"seed{seed}-{structure}{way}.json"

    def has(self, seed: int, chunk_sizes: tuple[int, ...], way: str) -> bool:
        """Whether an outcome is there."""
        return self._path(seed, chunk_sizes, way).exists()

    def add(self, seed: int, chunk_sizes: tuple[int, ...], way: str, outcome: dict) -> None:
        """Keep an outcome, whole or not at all."""
        path = self._path(seed, chunk_sizes, way)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"plan": self._plan, "outcome": outcome}, indent=1) + "\n")
        part.rename(path)

    def read(self) -> list[dict]:
        """All outcomes that there are, by the names of their files; chunk sizes are tuples again."""
        found = [json.loads(path.read_text())["outcome"] for path in sorted(self._runs.glob("*.json"))]
        return [{**entry, "chunk_sizes": tuple(entry["chunk_sizes"])} for entry in found]

    def base(
        self, seed: int, empty: Callable[[], Transformer], trained: Callable[[], Transformer], stage: str = ""
    ) -> Transformer:
        """The dense model that a seed's ways start from: made by ``trained`` once, then loaded into that of ``empty``.

        stage: ends the name of its file, where there are several of them, one made of the other.
        """
        path = self._runs / f"seed{seed}-base{stage}.pt"
        if path.exists():
            model = empty()
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        model = trained()
        weights = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        part = path.with_suffix(".part")
        torch.save(weights, part)
        part.rename(path)
        return model
