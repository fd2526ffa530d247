"""YAML and ``--set`` overrides -> the configuration, every error reported at once; and what differs between two of them."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from unfold.pretrain.config.numbers import setting_errors
from unfold.pretrain.config.schema import RunConfig
from unfold.pretrain.config.yaml_text import parse_value, read_yaml
from unfold.pretrain.errors import UserError

# Settings that may differ when a run is resumed: none of them changes what is learned or in which order.
FREE_ON_RESUME = ("parallel.", "checkpoint.", "faults.", "monitor.", "train.micro_batch", "train.activation_checkpointing",
                  "train.valid_", "train.allow_changes", "data.train", "data.valid", "data.tokenizer",
                  "data.cache")  # fmt: skip


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a YAML file and apply ``KEY=VALUE`` overrides with dotted keys.

    Raises:
        UserError: the file cannot be read, or keys or values are wrong; one message lists all of them.
    """
    tree = read_yaml(path, "--config")
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: holds {type(tree).__name__}, expected sections such as `model:` and `data:`")
    for item in overrides:
        _override(tree, item)
    return parse_config(tree, str(path))


def _override(tree: dict, item: str) -> None:
    key, sign, value = item.partition("=")
    if not sign or not key:
        raise UserError(f"--set {item}: expected KEY=VALUE, e.g. --set optimizer.lr=3e-4")
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {item}: {section} is a value, not a section")
    try:
        tree[last] = parse_value(value)
    except yaml.YAMLError:
        raise UserError(f"--set {item}: {value!r} is not a YAML value; quote it") from None


def parse_config(tree: dict, source: str = "configuration") -> RunConfig:
    """Plain dicts -> RunConfig. Raises UserError with every error."""
    errors = _unknown_keys(tree, RunConfig, "")
    known = _without_unknown(tree, RunConfig)
    errors += setting_errors(known, RunConfig)
    try:
        config = TypeAdapter(RunConfig).validate_python(known)
    except ValidationError as invalid:
        for error in invalid.errors():
            place = ".".join(str(part) for part in error["loc"])
            if error["type"] == "value_error":  # from a __post_init__: its parts already name their keys
                prefix = f"{place}." if place else ""
                errors += [prefix + part for part in str(error["ctx"]["error"]).split("; ")]
            else:
                given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
                errors.append(f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}{given}")
    if errors:
        raise UserError(f"{source}: " + "; ".join(errors))
    return config


def _sections(kind: type) -> dict[str, type]:
    """The fields of a configuration dataclass that are sections themselves."""
    return {name: hint for name, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(hint)}


def _unknown_keys(tree: dict, kind: type, prefix: str) -> list[str]:
    names = [f.name for f in dataclasses.fields(kind)]
    sections = _sections(kind)
    errors = []
    for key, value in tree.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(names)}"
            errors.append(f"{prefix}{key}: unknown key; {hint}")
        elif key in sections and isinstance(value, dict):
            errors += _unknown_keys(value, sections[key], f"{prefix}{key}.")
    return errors


def _without_unknown(tree: dict, kind: type) -> dict:
    sections = _sections(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    return {
        key: _without_unknown(value, sections[key]) if key in sections and isinstance(value, dict) else value
        for key, value in tree.items()
        if key in names
    }


def with_vocab_size(config: RunConfig, vocab_size: int) -> RunConfig:
    """The configuration with the tokenizer's vocabulary size. Raises UserError where it does not fit."""
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size}, but the tokenizer has {vocab_size} ids; set it to 0 to follow it"
        )
    try:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    except ValueError as error:
        raise UserError(str(error)) from None


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested dicts -> {dotted key: value}."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def changes_on_resume(old: dict, new: dict) -> dict[str, str]:
    """Differences between two configurations that would change what is learned: {dotted key: readable line}."""
    a, b = flatten(old), flatten(new)
    keys = [k for k in {**a, **b} if not k.startswith(FREE_ON_RESUME)]
    return {k: f"{k}: {a.get(k)!r} in the run, {b.get(k)!r} given" for k in keys if a.get(k) != b.get(k)}
