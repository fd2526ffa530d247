"""Exports in the hands of others: lm-evaluation-harness in both modes, llama.cpp by way of GGUF.

tests/benchmarks/downstream.py tells how to get what they need: a directory SITE and an archive FILE. Then

    LM_EVAL_SITE=SITE LLAMA_CPP_SDIST=FILE python -m pytest -m long tests/integration/test_downstream.py
"""

import math
import os
from pathlib import Path

import pytest

from tests import warm
from tests.benchmarks import downstream

pytestmark = pytest.mark.long


def installed(variable: str, what: str) -> Path:
    """The path that a variable names; skips without one."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name {what}; the first lines of tests/benchmarks/downstream.py tell how to get it")
    return Path(os.environ[variable])


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("downstream")
    config = tiny.config(directory / "c.yaml", model={"init_std": 0.2}, train={"steps": 2, "valid_every": 0})
    warm.command("pretrain", "train", "--config", config, "--run-dir", directory / "run")
    warm.command("pretrain", "export", "--run-dir", directory / "run", "--output", directory / "exported")
    return directory / "exported"


def test_harness(exported, tmp_path):
    """Dense figures are ours; with gists they are others, and numbers."""
    site = installed("LM_EVAL_SITE", "a directory with lm-eval 0.4.13")
    dense, gist = (downstream.harness(exported, site, tmp_path / mode, mode) for mode in ("dense", "gist"))
    assert downstream.difference(dense, downstream.ours(exported)) < 1e-3
    assert all(math.isfinite(value) for row in gist for value in row)
    assert downstream.difference(dense, gist) > 1e-3


def test_gguf(exported, tmp_path):
    """Nine tensors per layer, the embedding (tied) and the last norm; and what llama.cpp computes with them."""
    archive = installed("LLAMA_CPP_SDIST", "the source distribution of llama-cpp-python")
    site = installed("LM_EVAL_SITE", "a directory with xllamacpp")
    assert downstream.to_gguf(exported, archive, tmp_path / "gguf") == 2 * 9 + 2
    assert downstream.gguf_difference(exported, tmp_path / "gguf" / downstream.GGUF, site) < 1e-4
