"""Hugging Face directories: reading their JSON files, and making a directory whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from unfold.data_prep.format.text import read_text
from unfold.model.config import GistConfig
from unfold.pretrain.checkpoint.manifest import sync_directory
from unfold.pretrain.errors import UserError

ADAPTER = "adapter_config.json"  # what PEFT writes for LoRA and the like
UNFINISHED = "UNFINISHED"  # a file of this name marks a directory that was not written to its end


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A hidden directory that becomes ``output`` when the block ends; an error removes it, a kill leaves it marked.

    Raises:
        UserError: ``output`` exists.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists; name a new directory")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / UNFINISHED).touch()
        yield partial
        (partial / UNFINISHED).unlink()
        sync_directory(partial)
        partial.rename(output)
        sync_directory(output.parent)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors tells of a full disk
        raise UserError(f"--output {output}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_keys(directory: Path, name: str = "config.json") -> dict:
    """A JSON object of a Hugging Face directory.

    Raises:
        UserError: the directory, or the file, is missing, damaged or unfinished.
    """
    if (directory / UNFINISHED).exists():
        raise UserError(f"{directory}: was not written to its end (it holds {UNFINISHED}); export or copy it again")
    try:
        keys = json.loads(read_text(directory / name))
    except (FileNotFoundError, NotADirectoryError):
        if (directory / ADAPTER).exists():
            raise UserError(
                f"{directory}: holds an adapter ({ADAPTER}), not a model; save it merged: "
                "model.merge_and_unload().save_pretrained(DIR)"
            ) from None
        raise UserError(f"{directory}: has no {name}; give a directory that save_pretrained wrote, or one from the hub") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{directory / name}: cannot be read ({error})") from None
    if not isinstance(keys, dict):
        raise UserError(f"{directory / name}: holds {type(keys).__name__}, expected an object")
    return keys


# Entries of an export's gist settings that follow from its tokenizer.
OF_TOKENIZER = {"link_ids", "token_ids", "reserved_ids", "word_starts"}
OF_MODEL = {"layer_attention"}  # entries that are settings of the model
OF_TRAINING = {"choices"}  # which chunk sizes it was trained with: a new run chooses its own


def read_gists(directory: Path, keys: dict) -> GistConfig | None:
    """What an export's config.json says of its gists; None where it says nothing.

    Raises:
        UserError: it is no gist setting, or one that this version does not know.
    """
    entry = keys.get("gist")
    if entry is None:
        return None
    known = {field.name for field in dataclasses.fields(GistConfig)} - OF_TRAINING
    try:
        if unknown := sorted(entry.keys() - known - OF_TOKENIZER - OF_MODEL - OF_TRAINING):
            raise ValueError(f"{', '.join(unknown)}: not known to this version of unfold, which knows {', '.join(sorted(known))}")
        return GistConfig(**{name: value for name, value in entry.items() if name in known})
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{directory}/config.json: gist {_shortened(entry)} is no gist setting ({error})") from None


def _shortened(entry: object) -> str:
    text = json.dumps(entry)
    return text if len(text) < 200 else f"{text[:200]} .."


def write_json(path: Path, content: dict) -> None:
    """Readable JSON with a line feed at its end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
