"""Every configuration key with type, default and meaning, read off the dataclasses: docs/configuration.md is made of it."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

from unfold.pretrain.config.numbers import listed
from unfold.pretrain.config.read import FREE_ON_RESUME
from unfold.pretrain.config.schema import CHANGEABLE_ON_RESUME, RunConfig

PAGE_HEAD = """# Configuration reference

Every key of a run's configuration. The page is made from the configuration classes by

```
python -m pretrain config-reference > docs/configuration.md
```

A run's YAML file holds the keys that differ from their defaults; `--set KEY=VALUE` overrides them, with the dotted names
below (`--set optimizer.lr=3e-4 'gist.chunk_sizes=[8, 4]'`). Where a list is meant, one item may stand alone
(`--set gist.chunk_sizes=8`). Unknown keys are refused, and all errors are told at once.
The resolved configuration of a run stands in `config.yaml` of its run directory.

"On resume" says whether a run may go on with another value: *free*: yes; *allow*: where `train.allow_changes` names it;
*fixed*: no.
"""


@dataclass(frozen=True)
class Setting:
    """One configuration key.

    Attributes:
        key: dotted name.
        kind: its type in words.
        default: as written in its class; None is YAML's null, MISSING where the key must be given.
        resolved: the default with what follows from other defaults filled in (model.head_dim).
        doc: what it means.
    """

    key: str
    kind: str
    default: Any
    resolved: Any
    doc: str

    @property
    def on_resume(self) -> str:
        """Whether a run may be resumed with another value: free, allow or fixed."""
        if self.key.replace("train.stages[].", "train.").startswith(FREE_ON_RESUME):
            return "free"
        return "allow" if self.key.startswith(CHANGEABLE_ON_RESUME) else "fixed"


def sections(kind: type = RunConfig, prefix: str = "", instance: Any = None) -> Iterator[tuple[str, type, list[Setting]]]:
    """(dotted name with a final dot or '', class, its own settings) of a configuration class and of all sections in it."""
    hints = get_type_hints(kind)
    own, inner = [], []
    for f in dataclasses.fields(kind):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        resolved = getattr(instance, f.name, default)
        if dataclasses.is_dataclass(hints[f.name]):
            inner.append((hints[f.name], f"{prefix}{f.name}.", resolved))
        else:
            doc = f.metadata.get("doc", "")
            own.append(Setting(prefix + f.name, type_words(hints[f.name]), _plain(default), _plain(resolved), doc))
            if dataclasses.is_dataclass(item := listed(hints[f.name])):
                inner.append((item, f"{prefix}{f.name}[].", None))
    if own:
        yield prefix, kind, own
    for section in inner:
        yield from sections(*section)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def type_words(hint: Any) -> str:
    """``tuple[int, ...]`` -> list of int, ``int | None`` -> int or null, ``Literal[1, 2]`` -> 1 or 2."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join("null" if a is type(None) else type_words(a) for a in arguments)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, arguments))
    if dataclasses.is_dataclass(listed(hint)):
        return "list of sections"
    if typing.get_origin(hint) in (tuple, list):
        items = [type_words(a) for a in arguments if a is not Ellipsis]
        return f"list of {items[0]}" if len(set(items)) == 1 else f"[{', '.join(items)}]"
    return "section" if dataclasses.is_dataclass(hint) else hint.__name__


def reference_page() -> str:
    """docs/configuration.md."""
    parts = [PAGE_HEAD]
    for prefix, kind, settings in sections():
        title = f"`{prefix[:-1]}`" if prefix else "Top level"
        about = f"{_paragraph(kind)}\n\n" if prefix else ""
        rows = "".join(f"| {' | '.join(map(_cell, _row(s)))} |\n" for s in settings)
        parts.append(f"## {title}\n\n{about}| key | type | default | on resume | meaning |\n|---|---|---|---|---|\n{rows}")
    return "\n".join(parts)


def _paragraph(kind: type) -> str:
    """The first paragraph of a class's docstring as one line."""
    return " ".join(inspect.getdoc(kind).split("\n\n")[0].split())


def _row(setting: Setting) -> tuple[str, ...]:
    default = "must be given" if setting.default is dataclasses.MISSING else f"`{_yaml(setting.default)}`"
    return f"`{setting.key}`", setting.kind, default, setting.on_resume, setting.doc


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '""' if value == "" else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
