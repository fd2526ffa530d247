"""Parameters and configurations to and from transformers: every family gives the same logits on both sides."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.model.families import MODELS, SHAPE, architecture, random_model
from unfold.model.config import ModelConfig, RopeScaling
from unfold.model.gist import build_layout
from unfold.model.hf.keys import hf_config, model_config
from unfold.model.hf.names import entries, from_hugging_face, to_hugging_face
from unfold.model.layers import rotary_frequencies
from unfold.model.transformer import Transformer


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name, build) -> Transformer:
    return random_model(MODELS[name], build)


def dense_logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(ids, build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), None))


@torch.no_grad()
def difference(ours: Transformer, theirs) -> float:
    ids = torch.randint(0, ours.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(3))
    return float((theirs.eval()(ids).logits - dense_logits(ours, ids)).abs().max())


def test_transformers_gives_our_logits(name, model):
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = hf_config(model.config, "float32", None, None, None)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    assert type(theirs).__name__ == architecture(name) and keys["architectures"] == [architecture(name)]
    state = to_hugging_face({n: p.detach() for n, p in model.named_parameters()}, model.config)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    if model.config.tied_embeddings:
        theirs.tie_weights()
    assert difference(model, theirs) <= 1e-5


def their_model(name: str):
    """A random model made by transformers from its own class, as users get them, with an ordinary config.json."""
    import transformers

    keys = hf_config(MODELS[name], "float32", None, None, None)
    made = getattr(transformers, architecture(name).replace("ForCausalLM", "Config"))(**keys)
    torch.manual_seed(5)
    theirs = getattr(transformers, architecture(name))(made)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return theirs


def test_we_give_the_logits_of_transformers(name, build):
    theirs = their_model(name)
    config = model_config(json.loads(theirs.config.to_json_string()))
    ours = Transformer(config, build).eval()
    state = from_hugging_face(theirs.state_dict(), config)
    assert not any(key for key in ours.load_state_dict(state, strict=False).missing_keys if not key.endswith("_extra_state"))
    assert difference(ours, theirs) <= 1e-5
    back = to_hugging_face(state, config)
    expected = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight" or not config.tied_embeddings}
    assert back.keys() == expected.keys() and all(torch.equal(back[k], expected[k]) for k in back)


def test_the_configuration_maps_both_ways(name):
    config = MODELS[name]
    keys = hf_config(config, "float32", 1, 2, None)
    family = architecture(name).removesuffix("ForCausalLM").lower()
    scaling = replace(config.rope_scaling, attention_factor=config.rope_scaling.magnitude if "yarn" in name else None)
    expected = replace(config, family=family, attention="dense", rope_scaling=scaling)
    assert model_config(keys) == expected
    # A file of the older generation has no rope_parameters, one of the newer no rope_theta and rope_scaling.
    assert model_config({k: v for k, v in keys.items() if k not in ("rope_parameters", "dtype")}) == expected
    assert model_config({k: v for k, v in keys.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}) == expected


def test_the_map_is_that_of_the_model(model):
    """Names, shapes, pieces and what tensor parallelism splits are those of the parameters."""
    parameters = dict(model.named_parameters())
    table = {entry.ours: entry for entry in entries(model.config)}
    assert table.keys() == parameters.keys()
    for name, parameter in parameters.items():
        split = getattr(parameter, "tensor_model_parallel", False)
        expected = (tuple(parameter.shape), *((parameter.partition_dim, parameter.partition_stride) if split else (None, 1)))
        assert (table[name].shape(model.config), table[name].partition, table[name].pieces) == expected, name


def test_every_parameter_maps_both_ways(model):
    state = {n: p.detach() for n, p in model.named_parameters()}
    theirs = to_hugging_face(state, model.config)
    for entry in entries(model.config):
        assert [tuple(theirs[n].shape) for n in entry.theirs] == entry.their_shapes(model.config)
    back = from_hugging_face(theirs, model.config)
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)


def test_scaled_frequencies_are_of_all_three_kinds():
    plain, llama, yarn = (rotary_frequencies(MODELS[name]) for name in ("llama", "llama 3, scaled", "qwen 2.5, yarn"))
    assert torch.equal(plain, 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8))
    unscaled = 1.0 / 500.0 ** (torch.arange(0, 8, 2) / 8)
    for scaled in (llama, yarn):
        ratio = unscaled / scaled
        assert ratio[0] == 1 and ratio[-1] == 4 and any(1 < r < 4 for r in ratio.tolist())


def test_biases_start_at_zero_and_head_norms_at_one(build):
    model = Transformer(MODELS["qwen 3, biases, yarn"], build)
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    assert list(biases) == [f"layers.{i}.attention.{part}.bias" for i in range(2) for part in ("qkv", "output")]
    assert all(p.dim() == 1 and not p.any() for p in biases.values())
    assert all((p == 1).all() for n, p in model.named_parameters() if "_norm" in n)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"kind": "dynamic"}, "kind: 'dynamic' is not one of default, linear, llama3, yarn"),
        ({"factor": 0.5}, "factor: 0.5 is below 1"),
        ({"low_freq_factor": 4.0}, "high_freq_factor: 4.0 must be above low_freq_factor (4.0)"),
        ({"beta_slow": 64.0}, "beta_fast: 32.0 must be above beta_slow (64.0)"),
        ({"attention_factor": 0.0}, "attention_factor: 0.0 is not above 0"),
        ({"original_max_position": 0}, "original_max_position: 0 is below 1"),
    ],
)
def test_wrong_scaling_is_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        RopeScaling(**wrong)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"family": "gpt2"}, "family: 'gpt2' is not one of llama, qwen2, qwen3, mistral, smollm3"),
        ({"family": "qwen3"}, "qk_norm: False, but qwen3 always has one"),
        ({"family": "mistral", "mlp_bias": True}, "mlp_bias: True, but mistral always has none"),
        ({"output_bias": True}, "family: none of llama, qwen2, qwen3, mistral, smollm3 has just output_bias"),
        ({"family": "llama", "qkv_bias": True}, "output_bias: False, but llama has it where it has qkv_bias (True)"),
        ({"nope_layers": (1, 2)}, "nope_layers: [2] are not among the layers 0 to 1"),
        ({"qk_norm": True, "nope_layers": (1,)}, "has just qk_norm, nope_layers; such a model could not be exported"),
    ],
)
def test_a_model_of_no_family_is_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        ModelConfig(**{**SHAPE, **wrong})
    assert message in str(error.value)


REFUSED = {
    "mixture of experts": ({"architectures": ["MixtralForCausalLM"]}, "architectures: ['MixtralForCausalLM'] is not supported; "),
    "no architecture": ({"architectures": None, "model_type": "lama"}, "'lama' is not supported (did you mean llama?); supp"),
    "window": ({"sliding_window": 128}, "sliding_window: 128, but a llama has none; set it to null"),
    "kinds of layers": (
        {"model_type": "qwen2", "layer_types": ["chunked_attention", "full_attention"]},
        "layer_types: chunked_attention is not supported, only full_attention and sliding_attention",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only 'silu'"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quantised weights are not supported"),
    "rotary type": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling: rope_type 'dynamic' is not supported; supported are default, linear, llama3, yarn",
    ),
    "rotary part": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
                    "partial_rotary_factor: 0.5 is not supported"),
    "shape": ({"num_key_value_heads": 4}, "kv_heads: 4 does not divide heads (6)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case):
    changes, message = REFUSED[case]
    keys = {k: v for k, v in hf_config(MODELS["llama"], "float32", None, None, None).items() if k != "rope_parameters"}
    if "model_type" in changes:
        keys.pop("architectures")
    with pytest.raises(ValueError) as error:
        model_config({**keys, **changes})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_window_as_long_as_the_model_is_none():
    keys = hf_config(MODELS["mistral"], "float32", None, None, None)
    assert model_config({**keys, "sliding_window": keys["max_position_embeddings"]}).family == "mistral"
