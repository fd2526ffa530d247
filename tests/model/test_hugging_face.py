"""Parameters handed to transformers: its Llama and Qwen2 give our logits, with biases and stretched rotary positions."""

from __future__ import annotations

import pytest
import torch

from model.config import GistConfig, ModelConfig, RopeScaling
from model.gist import build_layout
from model.hf.llama import entries, from_hugging_face, hf_config, to_hugging_face
from model.layers import rotary_frequencies
from model.transformer import Transformer

SHAPE = dict(vocab_size=200, hidden_size=48, layers=2, heads=6, kv_heads=2, head_dim=8, ffn_size=40, attention="dense")
# original_max_position is short, so that slow, interpolated and fast frequencies all occur among four.
LLAMA3 = RopeScaling("llama3", factor=4.0, original_max_position=64)
MODELS = {
    "llama": ModelConfig(**SHAPE),
    "llama 3, scaled": ModelConfig(**SHAPE, rope_scaling=LLAMA3, rope_theta=500.0),
    "qwen 2": ModelConfig(**SHAPE, qkv_bias=True, tied_embeddings=False),
    "qwen 2, scaled": ModelConfig(**SHAPE, qkv_bias=True, rope_scaling=LLAMA3, norm_eps=1e-6),
}


@pytest.fixture(params=MODELS)
def model(request, build) -> Transformer:
    """A model all of whose parameters are random, biases and norms included."""
    model = Transformer(MODELS[request.param], build).eval()
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    return model


def test_transformers_gives_our_logits(model):
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = hf_config(model.config, "float32", None, None, None)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys)).eval()
    expected = "Qwen2ForCausalLM" if model.config.qkv_bias else "LlamaForCausalLM"
    assert type(theirs).__name__ == expected and keys["architectures"] == [expected]
    state = to_hugging_face({n: p.detach() for n, p in model.named_parameters()}, model.config)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    if model.config.tied_embeddings:
        theirs.tie_weights()
    ids = torch.randint(0, model.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(3))
    layout = build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), GistConfig((ids.shape[1] + 1,)))
    with torch.no_grad():
        difference = (theirs(ids).logits - model.logits(ids, layout)).abs().max()
    assert difference <= 1e-5


def test_every_parameter_maps_both_ways(model):
    state = {n: p.detach() for n, p in model.named_parameters()}
    assert {entry.ours for entry in entries(model.config)} == state.keys()
    back = from_hugging_face(to_hugging_face(state, model.config), model.config)
    for name, parameter in state.items():
        kept = slice(model.config.vocab_size) if name in ("embedding.weight", "head.weight") else slice(None)
        assert torch.equal(back[name][kept], parameter[kept])


def test_scaled_frequencies_are_of_all_three_kinds():
    plain, scaled = (rotary_frequencies(MODELS[name]) for name in ("llama", "llama 3, scaled"))
    assert torch.equal(plain, 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8))
    unscaled = 1.0 / 500.0 ** (torch.arange(0, 8, 2) / 8)
    ratio = unscaled / scaled
    assert ratio[0] == 1 and ratio[-1] == 4 and any(1 < r < 4 for r in ratio.tolist())


def test_a_bias_starts_at_zero(build):
    model = Transformer(MODELS["qwen 2"], build)
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    assert list(biases) == ["layers.0.attention.qkv.bias", "layers.1.attention.qkv.bias"]
    assert all(p.dim() == 1 and not p.any() for p in biases.values())


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"kind": "yarn"}, "kind: 'yarn' is not one of default, llama3"),
        ({"factor": 0.5}, "factor: 0.5 is below 1"),
        ({"low_freq_factor": 4.0}, "high_freq_factor: 4.0 must be above low_freq_factor (4.0)"),
        ({"original_max_position": 0}, "original_max_position: 0 is below 1"),
    ],
)
def test_wrong_scaling_is_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        RopeScaling(**wrong)
    assert message in str(error.value)
