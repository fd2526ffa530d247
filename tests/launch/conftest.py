"""One cluster for all tests of a session; what waits for SLURM most of the time waits side by side."""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch import scenarios
from tests.launch.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster():
    """A cluster; skips with the reason where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # SLURM's sockets need a short path
    cluster = Cluster(directory)
    try:
        if trouble := cluster.up():
            pytest.skip(f"SLURM cannot be brought up: {trouble}")
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def config(tiny, tmp_path_factory):
    """A run long enough to be disturbed."""
    path = tmp_path_factory.mktemp("slurm") / "tiny.yaml"
    train = {"steps": scenarios.STEPS, "global_batch": 4, "valid_every": 0}
    return tiny.config(path, data={"valid": []}, train=train, checkpoint={"every": scenarios.EVERY, "keep": 0})


@pytest.fixture(scope="session")
def runs(cluster, config, tmp_path_factory):
    """The scenarios, each under way in a thread: {name: future}."""
    root = tmp_path_factory.mktemp("runs with blanks")
    with ThreadPoolExecutor() as pool:
        yield {s.__name__: pool.submit(s, cluster, config, root / s.__name__) for s in scenarios.ALL}
