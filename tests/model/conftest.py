"""One process that is its own tensor-parallel group."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from model.layers import BuildContext


@pytest.fixture(scope="session")
def build():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    yield BuildContext(parallel_state.get_tensor_model_parallel_group(), 1)
