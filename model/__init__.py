"""The model: a Llama-shaped decoder with hierarchical gist sparse attention, on megatron-core's tensor-parallel layers."""
