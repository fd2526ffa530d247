"""``python -m pretrain export``: a checkpoint as a Hugging Face directory, proven before it is finished."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from unfold.pretrain.checkpoint.load import FoundRun, find_run
from unfold.pretrain.checkpoint.merged import weights_of
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.errors import UserError
from unfold.pretrain.hf.directory import new_directory, write_json
from unfold.pretrain.hf.export_weights import write_weights
from unfold.pretrain.hf.files import write_configs, write_model_card
from unfold.pretrain.hf.proof import file_hashes, files_of, prove

PROOF = "export_proof.json"
DTYPES = {"fp32": (torch.float32, "float32"), "bf16": (torch.bfloat16, "bfloat16"), "fp16": (torch.float16, "float16")}


def export(run_dir: Path, step: int | None, output: Path, dtype: str | None, max_shard_size: str = "5GB") -> Path:
    """Write a checkpoint of a run as a directory that ``transformers`` loads, plainly as a stock dense model.

    The directory gets its name only when the reloaded model gives our logits.

    Args:
        dtype: 'fp32', 'bf16' or 'fp16'; None takes the run's precision, and of a model that was imported and not trained its
            own.
        max_shard_size: of a safetensors file.

    Raises:
        UserError: the output exists, the run or checkpoint does not, or the reloaded model differs.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists; name a new directory")
    run = find_run(run_dir, step)
    dtype = dtype or _own_dtype(run)
    torch_dtype, name = DTYPES[dtype]
    with new_directory(output) as partial:
        files = write_weights(weights_of(run.directory, run.config), run.config.model, torch_dtype, partial, max_shard_size)
        write_configs(run, partial, name)
        write_model_card(run, partial)
        proof = prove(run, partial, torch_dtype)
        write_json(partial / PROOF, proof | {"files": file_hashes(partial, files)})
        for path in files_of(partial):  # the weights are on the disk already
            if path.name not in files:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
    print(f"{output}: step {run.manifest.step}, {dtype}, largest difference of logits {proof['largest_logit_difference']:.1e}")
    return output


def _own_dtype(run: FoundRun) -> str:
    """A trained checkpoint holds master weights in fp32, whatever the run computes in; one that was imported keeps its type."""
    if run.manifest.step:
        return run.config.precision
    stored = TensorDirectory(run.directory).dtype("model.embedding.weight")
    return next((name for name, (dtype, _) in DTYPES.items() if dtype == stored), run.config.precision)
