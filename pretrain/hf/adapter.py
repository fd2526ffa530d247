"""Adapters as PEFT writes and reads them: ``adapter_config.json`` and ``adapter_model.safetensors`` with PEFT's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unfold.data_prep.format.text import read_text
from unfold.model.config import LoraConfig, ModelConfig
from unfold.model.lora import A, B, fused_layers
from unfold.pretrain.checkpoint.load import FoundRun, find_run
from unfold.pretrain.checkpoint.merged import adapter_parts
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.config import RunConfig
from unfold.pretrain.errors import UserError
from unfold.pretrain.hf.directory import ADAPTER, new_directory, read_keys, write_json
from unfold.pretrain.hf.proof import compare_dense
from unfold.pretrain.train.trainable import is_trained, parameter_names

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"  # which holds the rows themselves, whatever its name says
MATRICES = {"embedding": "model.embed_tokens", "head": "lm_head"}
# Of an adapter's configuration: what of it has no counterpart here, and the values that say that it is not used.
UNSERVED = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "exclude_modules": (None, []),
}


def export_adapter(run_dir: Path, step: int | None, output: Path, base: Path) -> Path:
    """Write a run's adapters as a directory that PEFT loads beside ``base``, proven by the logits of the two together.

    Raises:
        UserError: the output exists, the run has no adapters or trained more than an adapter holds, or the logits differ.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists; name a new directory")
    run = find_run(run_dir, step)
    if not run.config.lora.rank:
        raise UserError(f"--adapter {base}: the run {run_dir} has no adapters (lora.rank: 0); export it without --adapter")
    more = [n for n in parameter_names(run.config) if is_trained(run.config, n) and not _in_adapter(n)]
    if more:
        raise UserError(
            f"--adapter {base}: train.trainable trained {more[0]} too, which an adapter does not hold; export without --adapter"
        )
    read_keys(base)  # before anything is written
    with new_directory(output) as partial:
        tensors, rows = _written(run)
        save_file({name: x.contiguous() for name, x in tensors.items()}, partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / ADAPTER, _keys(run.config.lora, rows, base))
        difference = compare_dense(run, partial, lambda: _with_peft(base, partial))
    print(f"{output}: adapters of step {run.manifest.step}, largest difference of logits {difference:.1e}")
    return output


def _in_adapter(name: str) -> bool:
    return name.endswith((f".{A}", f".{B}", ".rows"))


def _module(layer: int, name: str) -> str:
    """PEFT's name of a linear layer."""
    return f"{PREFIX}model.layers.{layer}.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}"


def _written(run: FoundRun) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """An adapter's tensors in fp32 by PEFT's names, and the ids whose rows are among them, by PEFT's name of the matrix."""
    config, tensors = run.config, TensorDirectory(run.directory)
    found: dict[str, Tensor] = {}
    for i in range(config.model.layers):
        for part, fused in fused_layers(config.model).items():
            for j, (a, b) in adapter_parts(tensors.read, f"layers.{i}", part, config.model, config.lora).items():
                module = _module(i, fused.names[j])
                found |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    rows: dict[str, list[int]] = {}
    for ours, theirs in MATRICES.items():
        if f"{ours}.rows" in parameter_names(config) and is_trained(config, f"{ours}.rows"):
            ids = sorted(run.tokenizer.reserved_ids)
            rows[theirs.split(".")[-1]] = ids
            found[f"{PREFIX}{theirs}{TOKENS}"] = tensors.read(f"model.{ours}.weight")[ids]
    return found, rows


def _keys(lora: LoraConfig, rows: dict[str, list[int]], base: Path) -> dict:
    whole = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": whole,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": list(lora.targets),
        "trainable_token_indices": rows or None,
    }


def _with_peft(base: Path, adapter: Path):
    """The base model with an adapter, as PEFT loads them, in fp32."""
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError("--adapter: the proof loads the adapter with PEFT, which is missing; pip install peft") from None
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"--adapter {base}: PEFT cannot load the adapter beside it ({_line(error)})") from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def read_adapter(directory: Path, config: RunConfig) -> dict[str, Tensor | dict[int, Tensor]]:
    """A PEFT adapter as the tensors of a checkpoint: whole ones by name, and of vocabulary matrices {id: row [hidden]}.

    Raises:
        UserError: it is missing, damaged, of another kind, or not what the ``lora`` section says.
    """
    setting = f"lora.init_from: {directory}"
    try:
        keys = json.loads(read_text(directory / ADAPTER))
        theirs = {name.removeprefix(PREFIX): x.float() for name, x in load_file(directory / WEIGHTS).items()}
    except FileNotFoundError as error:
        raise UserError(f"{setting} holds no {Path(error.filename).name}; give a directory that PEFT saved") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{setting} cannot be read ({_line(error)})") from None
    _check_keys(keys, theirs, config.lora, setting)
    found: dict[str, Tensor | dict[int, Tensor]] = {}
    for i in range(config.model.layers):
        for part in fused_layers(config.model):
            found |= dict(_taken(theirs, i, part, config.model, config.lora, setting))
    for ours, module in MATRICES.items():
        if (rows := theirs.pop(f"{module}{TOKENS}", None)) is not None:
            indices = keys.get("trainable_token_indices") or []
            ids = indices.get(module.split(".")[-1], []) if isinstance(indices, dict) else indices
            if len(ids) != len(rows):
                raise UserError(f"{setting} holds {len(rows)} rows of {module} for {len(ids)} ids")
            found[f"model.{ours}.weight"] = dict(zip(ids, rows))
    if theirs:
        raise UserError(f"{setting} holds {sorted(theirs)[0]}, which has no place in this model")
    return found


def _check_keys(keys: dict, theirs: dict[str, Tensor], lora: LoraConfig, setting: str) -> None:
    if keys.get("peft_type") != "LORA":
        raise UserError(f"{setting} is of the kind {keys.get('peft_type')}; LORA is served")
    strange = [f"{name}: {keys[name]!r}" for name, unused in UNSERVED.items() if keys.get(name) not in unused]
    if strange:
        raise UserError(f"{setting} has {', '.join(strange)}, which is not served here; merge it with PEFT and import the model")
    targets = sorted({name.split(".")[-3] for name in theirs if name.endswith(".lora_A.weight")})
    given = {"rank": keys.get("r"), "alpha": keys.get("lora_alpha"), "rslora": bool(keys.get("use_rslora"))}
    wrong = [f"lora.{name}={value}" for name, value in given.items() if getattr(lora, name) != value]
    if targets != sorted(lora.targets):
        wrong.append(f"'lora.targets=[{', '.join(targets)}]'")
    if wrong:
        raise UserError(f"{setting} was made with other settings; set {' '.join(wrong)}")


def _taken(
    theirs: dict[str, Tensor], layer: int, part: str, model: ModelConfig, lora: LoraConfig, setting: str
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint tensors of one linear layer's adapters; theirs are taken out."""
    fused, stacked, rows = fused_layers(model)[part], [], []
    chosen = fused.targeted(lora.targets)
    for i in chosen:
        module = _module(layer, fused.names[i]).removeprefix(PREFIX)
        for kind, into, shape in (
            ("lora_A", stacked, (lora.rank, fused.inputs)),
            ("lora_B", rows, (fused.groups * fused.sizes[i], lora.rank)),
        ):
            tensor = theirs.pop(f"{module}.{kind}.weight", None)
            if tensor is None or tuple(tensor.shape) != shape:
                what = "is missing" if tensor is None else f"is {list(tensor.shape)}"
                raise UserError(f"{setting}: {module}.{kind}.weight {what}, this model needs {list(shape)}")
            into.append(tensor)
    if not chosen:
        return
    prefix = f"model.layers.{layer}.{part}"
    yield f"{prefix}.{A}", torch.cat(stacked)
    if fused.stride(chosen) > 1:
        yield from ((f"{prefix}.{B}.{i}", x) for i, x in enumerate(rows))
    else:
        blocks = [x.unflatten(0, (fused.groups, fused.sizes[i])) for i, x in zip(chosen, rows)]
        yield f"{prefix}.{B}", torch.cat(blocks, 1).flatten(0, 1)
