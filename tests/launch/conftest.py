"""One cluster for all tests of a session, with a short training run that is disturbed in every way."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster():
    """Four nodes; skips with the reason where there can be none."""
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
        pass  # KEEPDEBUG


@pytest.fixture(scope="session")
def config(tiny, tmp_path_factory):
    """A run long enough to be disturbed, which saves every 40 steps."""
    path = tmp_path_factory.mktemp("slurm") / "tiny.yaml"
    train = {"steps": STEPS, "global_batch": 4, "valid_every": 0}
    return tiny.config(path, data={"valid": []}, train=train, checkpoint={"every": EVERY, "keep": 0})


STEPS, EVERY = 600, 40
