"""``python -m pretrain export``: a checkpoint as a plain Hugging Face directory, proven before it is finished."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from model.gist import GistConfig, build_layout
from model.hf.keys import hf_config
from model.hf.names import to_hugging_face
from model.transformer import Transformer
from pretrain.errors import UserError
from pretrain.load import LoadedRun, load_run
from pretrain.tokenizer import TokenizerInfo

TOLERANCE = 1e-4  # largest difference of fp32 logits between our model and the reloaded one
PROBE_TOKENS = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(run_dir: Path, step: int | None, output: Path, dtype: str | None) -> Path:
    """Write a checkpoint of a run as a directory that ``transformers`` loads as a stock Llama model.

    The directory gets its name only when the reloaded model gives our logits.

    Raises:
        UserError: the output exists, the run or checkpoint does not, or the reloaded model differs.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists; name a new directory")
    run = load_run(run_dir, step)
    dtype = dtype or run.config.precision
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_weights(run, partial, DTYPES[dtype])
    _write_configs(run, partial, dtype)
    for name in TOKENIZER_FILES:
        if (run.tokenizer.directory / name).exists():
            shutil.copy(run.tokenizer.directory / name, partial / name)
    proof = _prove(run, partial, DTYPES[dtype])
    (partial / "export_proof.json").write_text(json.dumps(proof, indent=1) + "\n")
    partial.rename(output)
    print(f"{output}: step {run.manifest.step}, {dtype}, largest difference of logits {proof['largest_logit_difference']:.1e}")
    return output


def _write_weights(run: LoadedRun, directory: Path, dtype: torch.dtype) -> None:
    state = to_hugging_face({n: p.detach() for n, p in run.model.named_parameters()}, run.config.model)
    state = {name: tensor.to("cpu", dtype) for name, tensor in state.items()}
    shards = split_torch_state_dict_into_shards(state)
    for filename, names in shards.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, directory / filename, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_configs(run: LoadedRun, directory: Path, dtype: str) -> None:
    tokenizer, model = run.tokenizer, run.config.model
    special = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    config = hf_config(model, {"fp32": "float32", "bf16": "bfloat16"}[dtype], *special)
    gist = dataclasses.asdict(run.config.gist)
    if model.attention == "gist":
        config["gist"] = gist | {"token_ids": list(tokenizer.gist_ids[: run.config.gist.levels])}
    generation = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), special))
    generation["suppress_tokens"] = list(tokenizer.gist_ids)  # a gist is never text
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    (directory / "README.md").write_text(_model_card(run))


def _model_card(run: LoadedRun) -> str:
    parameters = sum(p.numel() for p in run.model.parameters())
    model, gist = run.config.model, run.config.gist
    architecture = hf_config(model, run.config.precision, None, None, None)["architectures"][0]
    attention = f"gist attention, chunk sizes {list(gist.chunk_sizes)}" if model.attention == "gist" else "dense attention"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gist, sparse-attention]
---
# {run.config.monitor.name or "A language model trained with unfold"}

{architecture}, {parameters / 1e6:.1f} M parameters, trained with {attention} on {run.manifest.raw_tokens:,} raw tokens
({run.manifest.step:,} steps). Loaded plainly it runs as a dense model of that architecture.
"""


@torch.no_grad()
def _prove(run: LoadedRun, directory: Path, dtype: torch.dtype) -> dict:
    """Reload with transformers and compare: logits, loading report, tokenizer. Raises UserError on any difference."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reloaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if problems:
        raise UserError(f"{directory}: transformers reports {problems} on loading; the export was not finished")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, run.config.model.vocab_size, (1, PROBE_TOKENS)))
    ours = _dense_logits(run, ids, dtype)
    difference = float((reloaded.eval()(ids).logits - ours).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"{directory}: logits of the reloaded model differ by {difference:.2e} (allowed {TOLERANCE:.0e}); not finished"
        )
    _prove_tokenizer(run.tokenizer, AutoTokenizer.from_pretrained(directory), directory)
    return {
        "largest_logit_difference": difference,
        "tolerance": TOLERANCE,
        "probe_tokens": PROBE_TOKENS,
        "warnings": [str(w.message) for w in caught if "transformers" in (w.filename or "")],
        "step": run.manifest.step,
        "tokenizer_hash": run.tokenizer.hash,
    }


def _dense_logits(run: LoadedRun, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Our logits without gists, fp32 arithmetic on the weights as they were written."""
    model = Transformer(dataclasses.replace(run.config.model, attention="dense"), run.model.build)
    model.load_state_dict(run.model.state_dict())
    model.to(dtype).float().eval()
    layout = build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), GistConfig((ids.shape[1] + 1,)))
    return model.logits(ids, layout)


def _prove_tokenizer(ours: TokenizerInfo, reloaded, directory: Path) -> None:
    encoder = ours.tokenizer()
    texts = ("The state of the Union.", "  two  spaces\n\ttab", "na\u00efve caf\u00e9 \u4e16\u754c \U0001f30d", "1789, 2,026")
    for text in texts:
        expected = encoder.encode(text, add_special_tokens=False).ids
        got = reloaded.encode(text, add_special_tokens=False)
        if got != expected:
            raise UserError(f"{directory}: the reloaded tokenizer gives {got} for {text!r}, expected {expected}; not finished")
