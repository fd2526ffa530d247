"""What an export ships so that ``transformers`` can run it with gists: files of code, and entries of config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from unfold.model import kinds
from unfold.model.config import TRAINING_ONLY, GistConfig
from unfold.model.gist import growable, growing, joining, parts
from unfold.model.hf.gist_sequence import GistSettings, pack_word_starts

TOKENIZER_FILE = "exported_tokenizer.py"
TOKENIZER_MAP = {"AutoTokenizer": [None, "exported_tokenizer.PreTrainedTokenizerFast"]}
FILES = ("modeling_gist.py", "gist_attention.py", "own_kernels.py", "gist_sequence.py", "documents.py")
SHARED = (growable, growing, joining, parts, kinds)  # with generation


def remote_code_files() -> dict[str, str]:
    """File name -> content, to be written beside config.json, where they find one another by relative imports."""
    files = {name: Path(__file__).with_name(name).read_text() for name in FILES}
    files |= {Path(module.__file__).name: Path(module.__file__).read_text() for module in SHARED}
    for module in SHARED:
        here = f"from .{module.__name__.rpartition('.')[2]} import"
        files = {name: text.replace(f"from {module.__name__} import", here) for name, text in files.items()}
    return files


def tokenizer_code() -> dict[str, str]:
    """File name -> content of the code that goes with :data:`TOKENIZER_MAP`."""
    return {TOKENIZER_FILE: Path(__file__).with_name(TOKENIZER_FILE).read_text()}


def unknown_settings(gist: GistConfig) -> list[str]:
    """Settings that are no defaults and that the shipped code would not follow."""
    known = {field.name for field in dataclasses.fields(GistSettings)}
    fields = (field for field in dataclasses.fields(gist) if field.name not in {*known, *TRAINING_ONLY})
    return [field.name for field in fields if getattr(gist, field.name) != field.default]


def config_entries(
    architecture: str,
    gist: GistConfig,
    gist_ids: Sequence[int],
    reserved_ids: Sequence[int],
    word_starts: np.ndarray | None,
    link_ids: Sequence[int] = (),
    layer_attention: Sequence[str] = (),
) -> dict:
    """The entries of config.json that go with :func:`remote_code_files`.

    ``model_type`` and ``architectures`` stay those of the stock model: loaded plainly, it is a dense one.

    Args:
        architecture: the stock class, such as 'LlamaForCausalLM'.
        gist: how tokens are folded and recalled.
        gist_ids: one id per level, of the choice with most levels.
        reserved_ids: every id of the vocabulary that stands for no text, gists and links; never generated.
        word_starts: [vocab] bool; not looked at without ``gist.word_aware``.
        link_ids: of the links of one part of a linked context.
        layer_attention: kinds of layers; empty: all are gist layers.
    """
    if strange := unknown_settings(gist):
        raise ValueError(f"gist.{strange[0]}: {getattr(gist, strange[0])!r}; the code that exports ship does not know it")
    known = {field.name for field in dataclasses.fields(GistSettings)}
    entry = {name: value for name, value in dataclasses.asdict(gist).items() if name in known}
    entry |= {"chunk_sizes": list(gist.chunk_sizes), "token_ids": list(gist_ids), "reserved_ids": list(reserved_ids)}
    entry["link_ids"] = list(link_ids)
    del entry["choices"]
    if gist.choices:
        entry["choices"] = [list(choice.chunk_sizes) for choice in gist.choices]
    if layer_attention:
        entry["layer_attention"] = list(layer_attention)
    if gist.word_aware:  # said by the bitmap alone, as in exports from before there was a choice
        del entry["word_aware"]
        entry["word_starts"] = pack_word_starts(torch.from_numpy(np.ascontiguousarray(word_starts)))
    return {"gist": entry, "auto_map": {"AutoModelForCausalLM": f"modeling_gist.Gist{architecture}"}}
