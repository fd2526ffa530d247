"""A Hugging Face directory as transformers loads it; what is wrong with one in a line for users."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from unfold.pretrain.errors import UserError
from unfold.pretrain.hf.directory import read_keys

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them is there, whatever the tokenizer


def reload_tokenizer(directory: Path):
    """The tokenizer of a directory.

    Raises:
        UserError: the directory was not written to its end, or transformers finds no tokenizer in it.
    """
    read_keys(directory)
    if not any((directory / name).exists() for name in VOCABULARIES):
        raise UserError(f"--model {directory}: holds no {VOCABULARIES[0]}, nor another tokenizer; export or copy it again")
    from transformers import AutoTokenizer

    return _told(directory, "tokenizer", lambda: AutoTokenizer.from_pretrained(directory, local_files_only=True))


def reload_model(directory: Path):
    """The stock model of a directory, in the type that its config.json says, on this machine's best device.

    Every weight is that of its files.

    Raises:
        UserError: transformers cannot load it, or some weights are missing or of other shapes.
    """
    read_keys(directory)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would stand in the middle of what a command prints
    load = lambda: AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, output_loading_info=True)
    model, info = _told(directory, "model", load)
    # Transformers would fill what is missing with random numbers.
    if lacking := sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"]):
        raise UserError(
            f"--model {directory}: its files hold no {lacking[0]} as config.json describes it"
            f"{f', nor {len(lacking) - 1} other weights' if lacking[1:] else ''}; export or copy it again"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _told(directory: Path, what: str, load: Callable):
    try:
        return load()
    except Exception as error:  # of many kinds, and tokenizers raises no narrower one
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--model {directory}: transformers cannot load its {what} ({reason[:300]}); export or copy it again"
        ) from None
