"""The frame: which room imports which, and under what name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each package may import of the project's own (kernels <- model <- pretrain <- launch; data_prep: see the next tests).
ALLOWED = {
    "kernels": {"kernels"},
    "model": {"kernels", "model"},
    "pretrain": {"kernels", "model", "pretrain"},
    "launch": {"launch", "pretrain"},
    "data_prep": {"data_prep", "model"},
}
PROJECT = {*ALLOWED, "tests"}


def imported(path: Path) -> list[tuple[str, set[str]]]:
    """(module, names from it) of every absolute import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module, {alias.name for alias in node.names}))
    return found


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the project that a file imports something of, tests included."""
    modules = [module if module != "unfold" else f"unfold.{name}" for module, names in imported(path) for name in names or {""}]
    return {module.split(".")[1] for module in modules if module.startswith("unfold.")} | (
        {"tests"} & {module.split(".")[0] for module in modules}
    )


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_between_packages(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        foreign = imported_rooms(path) & PROJECT - ALLOWED[package]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_launch_imports_only_the_configuration_of_pretrain():
    for path in (ROOT / "launch").rglob("*.py"):
        for module, _ in imported(path):
            if module.startswith("unfold.pretrain"):
                assert module in ("unfold.pretrain.config", "unfold.pretrain.errors"), f"{path}: imports {module}"


def test_data_prep_uses_one_rule_of_the_model():
    """`inspect` shows where the model would put gists; that rule is written once. Nothing else of the model is used."""
    found = {}
    for path in (ROOT / "data_prep").rglob("*.py"):
        found.update((path.name, entry) for entry in imported(path) if entry[0].startswith("unfold.model"))
    assert found == {"describe.py": ("unfold.model.gist", {"GistConfig", "interleave"})}


def test_no_room_is_imported_by_a_name_of_its_own():
    """`pretrain.step` beside `unfold.pretrain.train.step` would be a second copy of the module, with classes of its own."""
    for package in (*PROJECT, "unfold"):
        for path in (ROOT / package).rglob("*.py"):
            bare = {module.split(".")[0] for module, _ in imported(path)} & ALLOWED.keys()
            assert not bare, f"{path.relative_to(ROOT)} imports {bare} without unfold"


def test_no_file_is_too_long():
    for package in PROJECT:
        for path in (ROOT / package).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 420, f"{path.relative_to(ROOT)} has {lines} lines"
