"""A checkpoint's weights as the safetensors files of a Hugging Face directory, a few tensors in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from unfold.model.config import ModelConfig
from unfold.model.hf.names import Entry, entries
from unfold.pretrain.checkpoint.tensors import Chunk, TensorDirectory, write_tensor_file
from unfold.pretrain.errors import UserError
from unfold.pretrain.hf.import_weights import INDEX


class _Source:
    """Reads our parameters; those of one entry are asked for in a row, so the last one is kept."""

    def __init__(self, checkpoint: TensorDirectory, config: ModelConfig):
        self._tensors, self._config = checkpoint, config
        self._last: tuple[str, list[Tensor]] = ("", [])

    def part(self, entry: Entry, i: int) -> Tensor:
        """The i-th of the Hugging Face tensors that hold a parameter."""
        if self._last[0] != entry.ours:
            self._last = ("", [])  # freed before the next one is read
            shape = entry.shape(self._config)
            pieces = []
            for name in entry.piece_names():
                self._tensors.expect(f"model.{name}", (shape[0] // entry.pieces, *shape[1:]))
                pieces.append(self._tensors.read(f"model.{name}"))
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            self._last = (entry.ours, entry.split(whole, self._config))
        return self._last[1][i]


def write_weights(
    checkpoint: TensorDirectory, config: ModelConfig, dtype: torch.dtype, directory: Path, max_shard_size: str
) -> dict[str, dict]:
    """Write the weights, in one file or in shards with an index.

    Args:
        checkpoint: a checkpoint's tensors.
        dtype: of the written tensors.
        max_shard_size: such as '5GB'; a larger tensor has a file of its own.

    Returns:
        {file name: {"bytes", "sha256"}}

    Raises:
        UserError: the checkpoint is of another model, or the size cannot be read.
    """
    source, chunks = _Source(checkpoint, config), {}
    for entry in entries(config):
        for i, (name, shape) in enumerate(zip(entry.theirs, entry.their_shapes(config), strict=True)):
            read = lambda entry=entry, i=i: source.part(entry, i).to(dtype)
            chunks[name] = Chunk(name, (0,) * len(shape), shape, dtype, read)
    shapes = {name: torch.empty(chunk.shape, dtype=dtype, device="meta") for name, chunk in chunks.items()}
    try:
        shards = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    except ValueError:
        raise UserError(f"--max-shard-size {max_shard_size}: is not a size such as 5GB or 500MB") from None
    files = {}
    for filename, names in shards.filename_to_tensors.items():
        files[filename] = write_tensor_file(directory / filename, [chunks[name] for name in names], parts=False)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files
