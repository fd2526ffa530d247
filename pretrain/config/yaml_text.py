"""YAML as people write it: every repeated key is an error, and numbers are what they look like.

YAML 1.1, which PyYAML reads, takes the last of two equal keys without a word, `010` for 8 and `1:30` for 90.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path

import yaml

from unfold.data_prep.format.text import read_text
from unfold.pretrain.errors import UserError

# Numbers of these forms only; `1:30` stays the text that it is, which no number's setting takes.
INTEGER = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class DuplicateKey(yaml.YAMLError):
    """The message has the key and both lines."""


class _Unique:
    """Of a loader: equal keys of one mapping are refused."""

    def construct_mapping(self, node, deep=False):
        seen: dict = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # the base class says what is wrong
            if key in seen:
                raise DuplicateKey(f"duplicate key {key!r} in lines {seen[key]} and {line}; keep one of them")
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Values(_Unique, yaml.SafeLoader):
    """Values by what they look like."""


class _Texts(_Unique, yaml.BaseLoader):
    """Every value is a text."""


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16) if "x" in text else int(text)


_Values.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_whole = lambda pattern: re.compile(f"^(?:{pattern.pattern})$")
_Values.add_implicit_resolver("tag:yaml.org,2002:int", _whole(INTEGER), list("-+0123456789"))
_Values.add_implicit_resolver("tag:yaml.org,2002:float", _whole(FLOAT), list("-+0123456789."))
_Values.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_value(text: str) -> object:
    """One value, as the right side of ``--set KEY=VALUE``. Raises yaml.YAMLError."""
    return yaml.load(text, _Values)


def read_yaml(path: str | Path, flag: str, texts: bool = False) -> object:
    """What a YAML file holds.

    Args:
        flag: that named it, for messages.
        texts: leave every value the text that it is.

    Raises:
        UserError: it cannot be read, is not YAML, or repeats a key.
    """
    try:
        return yaml.load(read_text(path), _Texts if texts else _Values)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except DuplicateKey as error:
        raise UserError(f"{flag} {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{flag} {path}:{where} is not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except ValueError as error:  # a date that is none, for instance
        raise UserError(f"{flag} {path}: is not valid YAML ({error}); put such a value in quotes") from None
