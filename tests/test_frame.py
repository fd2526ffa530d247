"""The frame: which package imports which, and that ours are the ones that run."""

import ast
import importlib
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


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_between_packages(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        foreign = imported_packages(path) & PROJECT - ALLOWED[package]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_launch_imports_only_the_configuration_of_pretrain():
    for path in (ROOT / "launch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pretrain"):
                assert node.module in ("pretrain.config", "pretrain.errors"), f"{path}: imports {node.module}"


def test_data_prep_uses_one_rule_of_the_model():
    """`inspect` shows where the model would put gists; that rule is written once. Nothing else of the model is used."""
    found = {}
    for path in (ROOT / "data_prep").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "model":
                found[path.name] = (node.module, {alias.name for alias in node.names})
    assert found == {"describe.py": ("model.gist", {"GistConfig", "interleave"})}


@pytest.mark.parametrize("package", ALLOWED)
def test_our_packages_are_the_ones_imported(package):
    """PyPI has a package named ``kernels``: run from the root, ours must win."""
    assert Path(importlib.import_module(package).__file__) == ROOT / package / "__init__.py"


def test_no_file_is_too_long():
    for package in PROJECT:
        for path in (ROOT / package).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 420, f"{path.relative_to(ROOT)} has {lines} lines"
