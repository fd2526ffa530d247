"""Other versions of transformers beside the installed one: in directories of a cache, which tests make themselves."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PACKAGE = "transformers"
OLDEST = "4.57.1"  # the oldest that exports are made for
NEWEST = "newest"  # on the registry, whatever that is today
# Under transformers these two are bound to it closely; all else that it needs is installed.
COMPANIONS = ("huggingface-hub", "tokenizers")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "unfold-tests"


class OutOfReach(Exception):
    """A version that cannot be had, with the reason."""


def newest() -> str:
    """The newest release on the registry."""
    done = _pip("index", "versions", PACKAGE)
    found = re.match(rf"{PACKAGE} \((\S+)\)", done.stdout)
    if done.returncode or not found:
        raise OutOfReach(f"the registry does not tell its newest {PACKAGE}: {_last_line(done)}")
    return found[1]


def directory_of(version: str) -> Path:
    """A directory that, first on the path, gives this version of transformers (or NEWEST); made where it is missing.

    Raises:
        OutOfReach: the package index cannot be reached, or lacks it.
    """
    version = newest() if version == NEWEST else version
    target = CACHE / f"{PACKAGE}-{version}-python{sys.version_info[0]}.{sys.version_info[1]}"
    if not target.exists():
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        _install(partial, f"{PACKAGE}=={version}")
        (dist,) = importlib.metadata.distributions(name=PACKAGE, path=[str(partial)])
        needs = [Requirement(text) for text in dist.requires or ()]
        others = [f"{r.name}{r.specifier}" for r in needs if r.name in COMPANIONS and not r.marker and not _is_met(r)]
        if others:
            _install(partial, *others)
        try:
            partial.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return target


def environment_of(version: str) -> dict[str, str]:
    """The environment of a process that finds this version; skips the test where it is out of reach."""
    try:
        target = directory_of(version)
    except OutOfReach as reason:
        pytest.skip(str(reason))
    return os.environ | {"PYTHONPATH": str(target), "HF_HOME": str(target / "home"), "PYTHONWARNINGS": "ignore"}


def _is_met(requirement: Requirement) -> bool:
    return importlib.metadata.version(requirement.name) in requirement.specifier


def _install(target: Path, *packages: str) -> None:
    done = _pip("install", "-q", "--no-deps", "--target", str(target), *packages)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        raise OutOfReach(f"pip cannot install {' '.join(packages)}: {_last_line(done)}")


def _pip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)


def _last_line(done: subprocess.CompletedProcess) -> str:
    return ([line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"])[-1]
