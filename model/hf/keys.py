"""``config.json`` of Hugging Face from a model's configuration, and back."""

from __future__ import annotations

import difflib
from typing import Any

from unfold.model.config import ModelConfig, RopeScaling
from unfold.model.families import FAMILIES, NO_WINDOWS, Family, find_family
from unfold.model.kinds import window_of
from unfold.model.settings import raise_together

# Parameters of a rotary type: their key -> ours. What is not in here is refused on import unless it says nothing.
ROPE_KEYS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_position",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
FULL, SLIDING = "full_attention", "sliding_attention"  # what layer_types may say
NO_EFFECT = {"partial_rotary_factor": (None, 1, 1.0), "truncate": (None, True), "mscale": (None,), "mscale_all_dim": (None,)}
# Keys that every family shares: theirs -> ours.
SHARED = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
    "initializer_range": "init_std",
}


def model_family(config: ModelConfig) -> Family:
    """The family that a model is exported as."""
    family, objections = find_family(config)
    assert family is not None and not objections, objections  # ModelConfig has checked itself
    return family


def hf_config(config: ModelConfig, dtype: str, bos: int | None, eos: int | list[int] | None, pad: int | None) -> dict[str, Any]:
    """``config.json``; eos is a list where several ids end a text.

    Keys of both generations are written (rope_parameters / rope_theta, dtype / torch_dtype): a reader that misses its own would
    silently fall back to defaults.
    """
    rope = _rope_parameters(config)
    is_scaled = rope["rope_type"] != "default"
    family = model_family(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **_family_keys(family, config),
        "vocab_size": config.vocab_size,
        **{theirs: getattr(config, ours) for theirs, ours in SHARED.items()},
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if is_scaled else None,
        "rope_parameters": rope,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    values = {theirs: getattr(scaling, ours) for theirs, ours in ROPE_KEYS[scaling.kind].items()}
    if scaling.kind == "yarn":
        values["attention_factor"] = scaling.magnitude  # written out: versions of transformers compute it differently
    return {"rope_type": scaling.kind, "rope_theta": config.rope_theta, **values}


def _family_keys(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The keys that not all families have."""
    bias = {"attention_bias": config.qkv_bias}
    windows = _window_keys(config)
    uses_rope = [int(i not in config.nope_layers) for i in range(config.layers)]
    return {
        "llama": {**bias, "mlp_bias": config.mlp_bias},
        "qwen2": windows,
        "qwen3": {**bias, **windows},
        "mistral": {"sliding_window": windows["sliding_window"]},
        "smollm3": {**bias, **windows, "mlp_bias": config.mlp_bias, "no_rope_layers": uses_rope},
    }[family.name]


def _window_keys(config: ModelConfig) -> dict[str, Any]:
    """Of a dense model what its layers see. One with gists tells it elsewhere: to who knows none all of its layers are dense."""
    windows = [window_of(kind) for kind in config.layer_kinds] if config.attention == "dense" else []
    size = next((window for window in windows if window), None)
    if size is None:
        return {"use_sliding_window": False, "sliding_window": None}
    types = [SLIDING if window else FULL for window in windows]
    # Older readers know no types, and a border alone: from there on every layer has a window.
    border = next(i for i in range(config.layers + 1) if all(windows[i:]))
    return {"use_sliding_window": True, "sliding_window": size, "max_window_layers": border, "layer_types": types}


def find_architecture(keys: dict[str, Any]) -> Family:
    """The family of a ``config.json``. Raises ValueError naming key, value and what is supported."""
    # Models saved with their gists, ours and published ones, are called by the class that put them in.
    named = [str(name).removeprefix("Gist") for name in keys.get("architectures") or []]
    by_class = {family.architecture: family for family in FAMILIES.values()}
    known = ", ".join(by_class)
    if len(named) == 1 and named[0] in by_class:
        return by_class[named[0]]
    if named:
        raise ValueError(f"architectures: {keys['architectures']} is not supported; supported are {known}")
    model_type = keys.get("model_type")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"model_type: {model_type!r} is not supported{hint}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def model_config(keys: dict[str, Any]) -> ModelConfig:
    """The model that a ``config.json`` describes; keys that are missing have the defaults of transformers.

    Raises:
        ValueError: another architecture, or something in it that our models do not have; names every such key.
    """
    from transformers import CONFIG_MAPPING  # late: it takes a second, and training does not need it

    family = find_architecture(keys)
    try:
        theirs = CONFIG_MAPPING[family.name](**keys)
    except Exception as error:  # its validation raises types of its own
        raise ValueError(f"transformers refuses it: {' '.join(str(error).split())}") from None
    errors = _unsupported(keys, theirs)
    scaling, rope_errors = _rope_scaling(theirs)
    raise_together(errors + rope_errors)
    values = {ours: getattr(theirs, key) for key, ours in SHARED.items() if getattr(theirs, key, None) is not None}
    has = lambda key: bool(getattr(theirs, key, False))
    nope = [i for i, uses in enumerate((getattr(theirs, "no_rope_layers", None) or [])[: values["layers"]]) if not uses]
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        **values,
        rope_theta=float(theirs.rope_parameters["rope_theta"]),
        rope_scaling=scaling,
        nope_layers=tuple(nope) if family.name == "smollm3" else (),
        qkv_bias=family.fixed.get("qkv_bias", has("attention_bias")),
        output_bias=family.fixed.get("output_bias", has("attention_bias")),
        mlp_bias=family.fixed.get("mlp_bias", has("mlp_bias")),
        qk_norm=family.fixed["qk_norm"],
        family=family.name,
        attention="dense",
        layer_attention=_layer_kinds(theirs),
    )


def _layer_kinds(theirs) -> tuple[str, ...]:
    """What every layer sees; nothing where all see everything, as where a window is as long as the longest text."""
    window = getattr(theirs, "sliding_window", None)
    if not getattr(theirs, "use_sliding_window", True) or window is None or window >= theirs.max_position_embeddings:
        return ()
    types = getattr(theirs, "layer_types", None) or [SLIDING] * theirs.num_hidden_layers
    kinds = tuple(f"window:{window}" if name == SLIDING else "dense" for name in types)
    if SLIDING not in types:
        return ()
    return kinds if len(set(kinds)) > 1 else kinds[:1]


def _unsupported(keys: dict[str, Any], theirs) -> list[str]:
    """What a configuration asks for that our models do not have."""
    errors = []
    if theirs.hidden_act != "silu":
        errors.append(f"hidden_act: {theirs.hidden_act!r} is not supported, only 'silu'")
    types = getattr(theirs, "layer_types", None) or []
    if strange := sorted({str(name) for name in types} - {FULL, SLIDING}):
        errors.append(f"layer_types: {', '.join(strange)} is not supported, only {FULL} and {SLIDING}")
    if find_architecture(keys).windows == NO_WINDOWS and (keys.get("sliding_window") or SLIDING in types):
        errors.append(f"sliding_window: {keys.get('sliding_window')}, but a {theirs.model_type} has none; set it to null")
    if SLIDING in types and not getattr(theirs, "sliding_window", None):
        errors.append(f"layer_types: {SLIDING}, but sliding_window is {getattr(theirs, 'sliding_window', None)}; give its size")
    if keys.get("quantization_config"):
        errors.append("quantization_config: quantised weights are not supported; give the model in bf16, fp16 or fp32")
    return errors


def _rope_scaling(theirs) -> tuple[RopeScaling, list[str]]:
    given = {k: v for k, v in theirs.rope_parameters.items() if k not in ("rope_theta", "type", "rope_type")}
    kind = theirs.rope_parameters.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        return RopeScaling(), [f"rope_scaling: rope_type {kind!r} is not supported; supported are {', '.join(ROPE_KEYS)}"]
    known = ROPE_KEYS[kind]
    strange = {k: v for k, v in given.items() if k not in known and v not in NO_EFFECT.get(k, ())}
    if kind in ("default", "linear"):  # transformers fills it in, nothing reads it
        strange.pop("original_max_position_embeddings", None)
    if strange:
        return RopeScaling(), [f"rope_scaling: {k}: {v!r} is not supported with rope_type {kind}" for k, v in strange.items()]
    values = {ours: given[key] for key, ours in known.items() if given.get(key) is not None}
    return RopeScaling(kind, **values), []
