"""Writing a tokenizer directory (its files are listed in `unfold.data_prep.format.tokenizer`)."""

import json
from pathlib import Path

import numpy as np

from unfold.data_prep.format.files import new_directory
from unfold.data_prep.format.tokenizer import CONFIG_FILE, INFO_FILE, JSON_FILE, MODEL_FILE, WORD_STARTS_FILE, Tokenizer


def write_directory(
    target: Path,
    tokenizer: Tokenizer,
    *,
    tokenizer_json: bytes,
    model: bytes | None,
    roles: dict[str, str],
    extra_config: dict | None = None,
    extra_files: dict[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write all files of a tokenizer directory, whole or not at all.

    Args:
        tokenizer: gives the info and the word starts.
        tokenizer_json: bytes of tokenizer.json.
        model: bytes of tokenizer.model, or None.
        roles: 'bos_token', 'eos_token', 'pad_token', 'unk_token' -> the token, those that there are.
        extra_config: further keys for tokenizer_config.json, such as `padding_side`.
        extra_files: further files, path within it -> content, such as a chat template.

    Raises:
        DataError: `target` exists and may not be replaced.
    """
    config = {
        # Without it transformers 4 returns token_type_ids, which generate() refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        **(extra_config or {}),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    with new_directory(target, overwrite, INFO_FILE) as partial:
        (partial / JSON_FILE).write_bytes(tokenizer_json)
        for name, content in {**(extra_files or {}), **({MODEL_FILE: model} if model is not None else {})}.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        np.save(partial / WORD_STARTS_FILE, tokenizer.word_starts())
        text = json.dumps(config, indent=1, ensure_ascii=False, sort_keys=True)
        (partial / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        (partial / INFO_FILE).write_text(tokenizer.info.to_json(), encoding="utf-8")
