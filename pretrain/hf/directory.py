"""Hugging Face directories: reading their JSON files, and making a directory whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from unfold.pretrain.checkpoint.manifest import sync_directory
from unfold.pretrain.errors import UserError

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
    except OSError as error:
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
        keys = json.loads((directory / name).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: has no {name}; give a directory that save_pretrained wrote, or one from the hub") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{directory / name}: cannot be read ({error})") from None
    if not isinstance(keys, dict):
        raise UserError(f"{directory / name}: holds {type(keys).__name__}, expected an object")
    return keys


def write_json(path: Path, content: dict) -> None:
    """Readable JSON with a line feed at its end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
