"""What would keep a run from being exported, told before it has trained for weeks."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.hf.remote import unknown_settings
from unfold.pretrain.data.tokenizer import RunTokenizer
from unfold.pretrain.hf.files import write_model_keys, write_tokenizer
from unfold.pretrain.hf.proof import prove_tokenizer


def export_objections(model: ModelConfig, gist: GistConfig, tokenizer: RunTokenizer) -> list[str]:
    """Why an export of such a model would not be finished, as far as that can be known without weights; one line each."""
    strange = unknown_settings(gist) if model.attention == "gist" else []
    found = [f"gist.{name}: the code that exports ship does not know it" for name in strange]
    with tempfile.TemporaryDirectory(prefix="unfold-export-") as scratch:
        directory = Path(scratch)
        try:
            known = dataclasses.replace(model, attention="dense") if strange else model
            write_model_keys(known, gist, tokenizer, directory, "float32")
            write_tokenizer(tokenizer, directory)
            prove_tokenizer(tokenizer, directory)
        except Exception as error:  # UserError, and whatever transformers makes of a tokenizer
            found.append(" ".join(str(error).replace(f"{directory}: ", "").removesuffix("; not finished").split()))
    return found
