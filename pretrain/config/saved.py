"""The settings that a run directory keeps: of its config.yaml, or, where that is damaged, of its newest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from unfold.pretrain.config.read import flatten, known_settings, parse_config
from unfold.pretrain.config.schema import RunConfig
from unfold.pretrain.errors import UserError


def saved_settings(run_dir: Path) -> tuple[dict | None, list[str]]:
    """The configuration that a run was made with, as plain dicts, and notes on what was passed over to read it.

    Settings that are newer than the run get their defaults; those that this version does not know are left out. None: no file
    tells it.
    """
    notes = []
    for path in (run_dir / "config.yaml", *sorted((run_dir / "checkpoints").glob("step-*/manifest.json"), reverse=True)):
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)["config"]
            if not isinstance(tree, dict):
                raise ValueError("it holds no sections")
            tree = _as_now(tree)
            known = known_settings(tree)
            config = parse_config(known, str(path)).to_dict()
        except (yaml.YAMLError, OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            notes.append(f"{path}: is damaged or of another version ({reason}); the settings are read elsewhere")
            continue
        if strange := sorted(flatten(tree).keys() - flatten(known).keys()):
            notes.append(f"{path}: this version does not know {', '.join(strange)}; left out")
        return config, notes
    return None, notes


def parse_saved(tree: dict, source: str) -> RunConfig:
    """What a run, a checkpoint or an export wrote of its configuration, by this or an earlier version. Raises UserError."""
    return parse_config(_as_now(tree), source)


def _as_now(tree: dict) -> dict:
    """Settings of earlier versions as this one says them."""
    train = tree.get("train")
    if not isinstance(train, dict) or "recall_after" not in train:
        return tree
    train = dict(train)
    forgetting = train.pop("recall_after")
    if forgetting:
        train["stages"] = [{"until": min(forgetting, train.get("steps", forgetting)), "recall": "none"}]
    return tree | {"train": train}
