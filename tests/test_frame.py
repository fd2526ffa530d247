"""The frame: under what names modules are imported, which may import which, and how folders are filled."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import unfold

ROOT = Path(__file__).parent.parent
# What each room may import of the project: kernels <- model <- pretrain <- launch; nothing imports launch or tests.
ALLOWED = {
    "kernels": ("unfold.kernels",),
    "model": ("unfold.kernels", "unfold.model"),
    "pretrain": ("unfold.kernels", "unfold.model", "unfold.pretrain", "unfold.data_prep.format"),
    "launch": ("unfold.launch", "unfold.pretrain.config", "unfold.pretrain.errors"),
    "data_prep": ("unfold.data_prep", "unfold.model.gist"),
}
FOLDERS = (*ALLOWED, "unfold", "tests")


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return name if parts[0] in ("tests", "unfold") else f"unfold.{name}"


@cache
def modules() -> dict[str, Path]:
    """Name -> file of every module of the project."""
    return {module_name(path): path for folder in FOLDERS for path in python_files(folder)}


@cache
def imports(path: Path) -> frozenset[tuple[str, str]]:
    """(module, name taken from it or '') of every import of a file, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join([*module_name(path).split(".")[: -node.level], *module.split(".")])
            found |= {(module, alias.name) for alias in node.names}
    return frozenset(found)


def imported_modules(path: Path) -> set[str]:
    """The project's own modules that a file imports: `from a import b` is a.b where that is a module."""
    whole = {f"{module}.{name}" if f"{module}.{name}" in modules() else module for module, name in imports(path)}
    return {name for name in whole if name.split(".")[0] in ("unfold", "tests")}


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_between_rooms(room):
    files = python_files(room)
    assert files
    for path in files:
        for name in imported_modules(path):
            allowed = any(name == a or name.startswith(f"{a}.") for a in (*ALLOWED[room], f"unfold.{room}"))
            assert allowed or name == "unfold", f"{path.relative_to(ROOT)} imports {name}"


def test_data_prep_uses_one_rule_of_the_model():
    """`inspect` shows where the model would put gists; that rule is written once. Nothing else of the model is used."""
    found = {(path.name, *i) for path in python_files("data_prep") for i in imports(path) if i[0].startswith("unfold.model")}
    assert found == {("describe.py", "unfold.model.gist", name) for name in ("Bundle", "GistConfig", "interleave")}


def test_no_room_is_imported_by_a_name_of_its_own():
    """`pretrain.step` beside `unfold.pretrain.step` would be a second copy of the module, with classes of its own."""
    for path in modules().values():
        bare = {module.split(".")[0] for module, _ in imports(path)} & ALLOWED.keys()
        assert not bare, f"{path.relative_to(ROOT)} imports {bare} without unfold"


def test_no_room_is_a_package_of_its_own():
    """A folder `kernels` with an __init__.py would hide, from the root, the package of that name that transformers looks for."""
    assert not [room for room in ALLOWED if (ROOT / room / "__init__.py").exists()]
    assert Path(unfold.__file__) == ROOT / "unfold" / "__init__.py"


def test_no_import_circles():
    """Imports inside functions count: they put off a circle, and hide it."""
    arrows = {name: imported_modules(path) & modules().keys() - {name} for name, path in modules().items()}
    while leaves := [name for name, targets in arrows.items() if not targets]:
        for name in leaves:
            del arrows[name]
        arrows = {name: targets - set(leaves) for name, targets in arrows.items()}
    assert not arrows, f"in circles, or leading to one: {sorted(arrows)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_prefix_of_three_files_is_a_folder(folder):
    for directory in {path.parent for path in python_files(folder)}:
        stems = [path.stem for path in directory.glob("*.py") if not path.stem.startswith("__")]
        # A test is named after its subject: test_unfold_triton begins with unfold.
        prefixes = Counter((stem.startswith("test_"), stem.removeprefix("test_").split("_")[0]) for stem in stems)
        shared = [prefix for (_, prefix), count in prefixes.items() if count >= 3]
        assert not shared, f"{directory.relative_to(ROOT)}: three files begin with {shared}"


def test_pretrain_can_be_taken_in_at_a_glance():
    entries = [path.name for path in (ROOT / "pretrain").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 16, sorted(entries)


def test_every_function_can_be_read_at_once():
    """A function that does more than fits a screen does more than one thing; how long a file is says little."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 90, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"
