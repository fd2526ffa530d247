"""How an imported model ends and samples its texts: ``generation_config.json`` on its way in and out again."""

from __future__ import annotations

from pathlib import Path

from unfold.pretrain.data.tokenizer import GENERATION_FILE, RunTokenizer, generation_settings, ids_of
from unfold.pretrain.errors import UserError
from unfold.pretrain.hf.directory import read_keys, write_json

NOT_KEPT = ("_from_model_config", "transformers_version")  # what transformers notes of itself


def write_generation(source: Path, keys: dict, tokenizer: RunTokenizer, directory: Path) -> None:
    """Keep beside the tokenizer what a Hugging Face directory says of generation; nothing is written where it says nothing.

    Args:
        keys: its config.json, whose end ids count where generation_config.json names none.
        tokenizer: the new one; every id must be of its vocabulary.
        directory: of the new tokenizer.

    Raises:
        UserError: the file is damaged, or an id is none.
    """
    file = GENERATION_FILE if (source / GENERATION_FILE).exists() else "config.json"
    settings = read_keys(source, GENERATION_FILE) if file == GENERATION_FILE else {}
    if settings.get("eos_token_id") is None:
        file, settings = "config.json", settings | {"eos_token_id": keys.get("eos_token_id")}
    ends = ids_of(settings["eos_token_id"])
    known = range(tokenizer.vocab_size)
    if wrong := [i for i in ends if not isinstance(i, int) or isinstance(i, bool) or i not in known]:
        raise UserError(f"{source}/{file}: eos_token_id {wrong[0]!r} is not an id of its tokenizer, which has {len(known)}")
    kept = {key: value for key, value in settings.items() if key not in NOT_KEPT and value is not None}
    for key in ("bos_token_id", "pad_token_id"):  # -1 and the like say that there is none
        if key in kept and kept[key] not in known:
            del kept[key]
    if kept:
        write_json(directory / GENERATION_FILE, kept)


def exported_generation(tokenizer: RunTokenizer) -> dict:
    """``generation_config.json`` of an export: the tokenizer's own ids, and else what the imported model said."""
    kept = generation_settings(tokenizer.directory)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos_of(tokenizer), "pad_token_id": tokenizer.pad_id}
    ids = {key: kept.get(key) if value is None else value for key, value in ids.items()}
    suppressed = list(dict.fromkeys([*tokenizer.reserved_ids, *(kept.get("suppress_tokens") or ())]))  # a gist is never text
    return kept | ids | ({"suppress_tokens": suppressed} if suppressed else {})


def eos_of(tokenizer: RunTokenizer) -> int | list[int] | None:
    """The id that ends a text, or all of them where there are several."""
    return list(tokenizer.stop_ids) if len(tokenizer.stop_ids) > 1 else tokenizer.eos_id
