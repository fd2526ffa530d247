"""Small random models of every family that we share with Hugging Face, with every option that changes what they compute."""

from __future__ import annotations

import torch

from unfold.model.config import ModelConfig, RopeScaling
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer

SHAPE = dict(vocab_size=200, hidden_size=48, layers=2, heads=6, kv_heads=2, head_dim=8, ffn_size=40, attention="dense")
# original_max_position is short, so that slow, interpolated and fast frequencies all occur among four.
LLAMA3 = RopeScaling("llama3", factor=4.0, original_max_position=64)
YARN = RopeScaling("yarn", factor=4.0, original_max_position=64)

MODELS = {
    "llama": ModelConfig(**SHAPE),
    "llama 2, linear": ModelConfig(**{**SHAPE, "kv_heads": 6}, tied_embeddings=False, rope_scaling=RopeScaling("linear", 2.0)),
    "llama 3, scaled": ModelConfig(**SHAPE, rope_scaling=LLAMA3, rope_theta=500.0),
    "llama, all biases": ModelConfig(**SHAPE, qkv_bias=True, output_bias=True, mlp_bias=True),
    "qwen 2": ModelConfig(**SHAPE, qkv_bias=True, tied_embeddings=False),
    "qwen 2, scaled": ModelConfig(**SHAPE, qkv_bias=True, rope_scaling=LLAMA3, norm_eps=1e-6),
    "qwen 2.5, yarn": ModelConfig(**SHAPE, qkv_bias=True, rope_scaling=YARN, rope_theta=500.0, max_position=256),
    "qwen 3": ModelConfig(**{**SHAPE, "head_dim": 16}, qk_norm=True),
    "qwen 3, biases, yarn": ModelConfig(
        **SHAPE,
        qk_norm=True,
        qkv_bias=True,
        output_bias=True,
        tied_embeddings=False,
        max_position=512,
        rope_scaling=RopeScaling("yarn", 8.0, original_max_position=64, beta_fast=8.0, beta_slow=0.5, attention_factor=1.5),
    ),
    "mistral": ModelConfig(**{**SHAPE, "head_dim": 12}, tied_embeddings=False, family="mistral"),
    "mistral, window": ModelConfig(**{**SHAPE, "head_dim": 12}, family="mistral", layer_attention=("window:9",)),
    "qwen 2, windows": ModelConfig(**SHAPE, qkv_bias=True, layer_attention=("dense", "window:20")),
    "qwen 3, windows": ModelConfig(**{**SHAPE, "layers": 3}, qk_norm=True, layer_attention=("window:20", "window:20", "dense")),
    "smollm 3, windows": ModelConfig(**SHAPE, nope_layers=(0,), family="smollm3", layer_attention=("window:5", "dense")),
    "smollm 3": ModelConfig(**{**SHAPE, "layers": 3}, nope_layers=(0, 2), rope_theta=2e6),
    "smollm 3, biases": ModelConfig(
        **SHAPE, family="smollm3", nope_layers=(1,), qkv_bias=True, output_bias=True, mlp_bias=True, tied_embeddings=False
    ),
}
CLASSES = {"qwen 2": "Qwen2", "qwen 2.5": "Qwen2", "qwen 3": "Qwen3", "mistral": "Mistral", "smollm 3": "SmolLM3"}


def architecture(name: str) -> str:
    """The class in transformers of one of MODELS."""
    return f"{CLASSES.get(name.split(',')[0], 'Llama')}ForCausalLM"


def random_model(config: ModelConfig, build: BuildContext) -> Transformer:
    """A model all of whose parameters are random, biases and norms included."""
    model = Transformer(config, build).eval()
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
        for name in ("embedding", "head"):
            if hasattr(model, name):
                getattr(model, name).weight[config.vocab_size :] = 0
    return model
