"""YAML and ``--set`` overrides -> the configuration, every error reported at once; and what differs between two of them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, get_args, get_origin, get_type_hints

import yaml

from unfold.data_prep.format.text import encodable
from unfold.model.settings import SettingsError, choice_text
from unfold.pretrain.config.numbers import listed, section_of, setting_errors
from unfold.pretrain.config.schema import RunConfig
from unfold.pretrain.config.yaml_text import parse_value, read_yaml
from unfold.pretrain.errors import UserError

Kind = TypeVar("Kind")

# Settings that may differ when a run is resumed: none of them changes what is learned or in which order.
FREE_ON_RESUME = ("parallel.", "checkpoint.", "faults.", "monitor.", "evaluation.", "train.micro_batch",
                  "train.activation_checkpointing",
                  "train.offload_activations", "train.mlp_tiles", "train.fuse_pointwise", "train.valid_", "train.allow_changes",
                  "data.train", "data.valid", "data.tokenizer", "data.cache")  # fmt: skip


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The flag ``--set``: one or more overrides after it, as often as one likes."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override settings, e.g. optimizer.lr=3e-4 train.steps=10",
    )


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a YAML file and apply ``KEY=VALUE`` overrides with dotted keys.

    Raises:
        UserError: the file cannot be read, or keys or values are wrong; one message lists all of them.
    """
    tree = read_yaml(path, "--config")
    if not isinstance(tree, dict):
        holds = "is empty" if tree is None else f"holds {type(tree).__name__}"
        raise UserError(f"--config {path}: {holds}, expected sections such as `model:` and `data:`")
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
    return read_settings(RunConfig, tree, source)


# Settings of earlier versions: what says the same now.
REPLACED = {"train.recall_after": "write train.stages: [{until: STEPS, recall: none}]"}
# Values of earlier versions, which hold on: the same in today's words.
SAID_BEFORE = {"train.activation_checkpointing": {True: "full", False: "none"}}


def read_settings(kind: type[Kind], tree: dict, source: str) -> Kind:
    """Plain dicts -> a configuration dataclass. Raises UserError with every error. source: where the dicts come from."""
    from pydantic import TypeAdapter, ValidationError  # late: commands that read no configuration start without it

    if errors := [f"{key}: {problem}" for key, text in _texts_in(tree) if (problem := encodable(text))]:
        raise UserError(f"{source}: " + "; ".join(errors))  # pydantic takes no such text
    known = _known(tree, kind, "", errors)
    errors += setting_errors(known, kind)
    try:
        settings = TypeAdapter(kind).validate_python(known)
    except ValidationError as invalid:
        errors += [text for error in invalid.errors() for text in _texts(error)]
    if errors:
        raise UserError(f"{source}: " + "; ".join(dict.fromkeys(errors)))
    return settings


def _texts_in(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text that stands in plain dicts and lists, keys too."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list | tuple):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            place = f"{key}.{name}" if key else str(name)
            yield ascii(place), place
            yield from _texts_in(part, place)


def known_settings(tree: dict) -> dict:
    """The settings of a run's plain dicts that this version knows."""
    return _known(tree, RunConfig, "", [])


def _known(tree: dict, kind: type, prefix: str, errors: list[str]) -> dict:
    """The known keys of a section, as they are meant: an item where a list belongs is a list of one. Adds to the errors."""
    hints = get_type_hints(kind)
    known = {}
    for key, value in tree.items():
        hint = hints.get(key)
        if isinstance(value, bool):
            value = SAID_BEFORE.get(f"{prefix}{key}", {}).get(value, value)
        if hint is None:
            near = difflib.get_close_matches(str(key), hints, 1, 0.5)
            told = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            errors.append(f"{prefix}{key}: unknown key; {REPLACED.get(prefix + str(key), told)}")
        elif (section := section_of(hint)) and isinstance(value, dict):
            known[key] = _known(value, section, f"{prefix}{key}.", errors)
        elif dataclasses.is_dataclass(item := listed(hint)):
            items = [value] if isinstance(value, dict) else value
            if isinstance(items, list):
                named = enumerate(items)
                items = [_known(x, item, f"{prefix}{key}.{i}.", errors) if isinstance(x, dict) else x for i, x in named]
            known[key] = items
        else:
            known[key] = [value] if get_origin(hint) is tuple and isinstance(value, (str, int)) else value
            if isinstance(value, bool) and hint is not bool and bool not in get_args(hint):  # which pydantic takes for 0 or 1
                errors.append(f"{prefix}{key}: {str(value).lower()} is not one of the values that it takes")
    return known


def _texts(error: dict) -> list[str]:
    """What one of pydantic's errors says to people; its parts name their settings by their dotted names."""
    place, context = ".".join(str(part) for part in error["loc"]), error.get("ctx", {})
    if isinstance(found := context.get("error"), ValueError):  # from a __post_init__
        return [f"{place}.{text}" if place else text for text in getattr(found, "errors", [str(found)])]
    given = error["input"]
    if error["type"] == "literal_error" and not isinstance(given, (dict, list)):
        return [f"{place}: {choice_text(given, [context['expected'].replace(' or ', ', ').replace(chr(39), '')])}"]
    if error["type"] == "dataclass_type":
        what = "is empty; leave it out, or set something in it" if given is None else f"{given!r} is no section of settings"
        return [f"{place}: {what}"]
    told = "" if error["type"] == "missing" else f" (given: {given!r})"
    return [f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}{told}"]


def with_vocab_size(config: RunConfig, vocab_size: int) -> RunConfig:
    """The configuration with the tokenizer's vocabulary size. Raises UserError where it does not fit."""
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size}, but the tokenizer has {vocab_size} ids; set it to 0 to follow it"
        )
    try:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    except SettingsError as error:
        raise UserError("; ".join(error.errors)) from None


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested dicts -> {dotted key: value}; lists stay values."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _without_free(tree: dict) -> dict:
    """A configuration without what its stages may change on resume."""
    train = tree.get("train", {})
    stages = [{k: v for k, v in stage.items() if f"train.{k}" not in FREE_ON_RESUME} for stage in train.get("stages") or ()]
    return tree | {"train": train | {"stages": stages}}


def changes_on_resume(old: dict, new: dict) -> dict[str, str]:
    """Differences between two configurations that would change what is learned: {dotted key: readable line}."""
    a, b = (flatten(_without_free(tree)) for tree in (old, new))
    keys = [k for k in {**a, **b} if not k.startswith(FREE_ON_RESUME)]
    return {k: f"{k}: {a.get(k)!r} in the run, {b.get(k)!r} given" for k in keys if a.get(k) != b.get(k)}
