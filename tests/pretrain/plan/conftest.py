"""What plans are compared on needs one process group."""

from __future__ import annotations

import pytest

from unfold.model.layers import BuildContext
from unfold.pretrain import parallel as parallel_groups
from unfold.pretrain.config import ParallelConfig


@pytest.fixture(scope="module")
def build() -> BuildContext:
    """One process that is its own tensor-parallel group."""
    return BuildContext(parallel_groups.initialize(ParallelConfig()).tensor_group, 1)
