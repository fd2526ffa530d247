"""What is used of megatron-core, imported in one place.

While it is imported, megatron-core hands functions that are not used here to ``torch.compile``, which loads the whole compiler: a
third of the processor time that a rank takes to start. They stay as they are written; ``torch.compile`` itself is as before
afterwards.
"""

from unittest.mock import patch

with patch("torch.compile", lambda function=None, **options: (lambda later: later) if function is None else function):
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_tensor_model_parallel_region,
        linear_with_grad_accumulation_and_async_allreduce,
        reduce_from_tensor_model_parallel_region,
        set_tensor_model_parallel_attributes,
    )
    from megatron.core.tensor_parallel.layers import linear_with_frozen_weight

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "linear_with_frozen_weight",
    "linear_with_grad_accumulation_and_async_allreduce",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "set_tensor_model_parallel_attributes",
]
