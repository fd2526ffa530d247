"""Adopting an existing tokenizer: the same ids, with gist and link tokens after them."""

from collections.abc import Container, Sequence
from pathlib import Path

from tokenizers import AddedToken

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.directory import write_directory
from unfold.data_prep.format.files import check_new_directory
from unfold.data_prep.format.tokenizer import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    INFO_FILE,
    JSON_FILE,
    MODEL_FILE,
    MORE_TEMPLATES,
    TokenizerInfo,
    check_gists,
    find_gists,
    locate,
    missing_tokens,
    read_json,
)
from unfold.data_prep.tokenization.convert import to_huggingface
from unfold.data_prep.tokenization.huggingface import HuggingFaceTokenizer, parse_tokenizer
from unfold.data_prep.tokenization.sentencepiece import SentencePieceTokenizer, parse_model

# Keys of a tokenizer_config.json that say how its files were loaded, not what the tokenizer does: ours say it themselves.
LOADING_KEYS = {
    "add_prefix_space", "added_tokens_decoder", "auto_map", "backend", "is_local", "legacy", "local_files_only", "name_or_path",
    "processor_class", "sp_model_kwargs", "special_tokens_map_file", "tokenizer_class", "tokenizer_file", "transformers_version",
}  # fmt: skip


def import_tokenizer(
    source: str | Path,
    output: str | Path,
    *,
    gist_levels: int = 4,
    links: int = 0,
    roles: dict[str, str] | None = None,
    overwrite: bool = False,
) -> TokenizerInfo:
    """Write a tokenizer directory for a sentencepiece .model or a Hugging Face tokenizer.json (or a directory of one).

    Args:
        gist_levels: levels that shall have a gist token; the vocabulary's missing ones are appended.
        links: link tokens that there shall be; missing ones are appended after the gists.
        roles: 'bos_token', 'eos_token', 'pad_token' -> token, for Hugging Face tokenizers that name none.

    Raises:
        DataError: no tokenizer there, it cannot be converted, or `output` exists.
    """
    output = Path(output)
    check_new_directory(output, overwrite, INFO_FILE)
    kind, path = locate(Path(source))
    if kind == "directory":
        kind = TokenizerInfo.from_file(path / INFO_FILE).kind
        path = path / (MODEL_FILE if kind == "sentencepiece" else JSON_FILE)
    if kind == "sentencepiece":
        if roles:
            raise DataError(
                f"{path}: a sentencepiece model names its own bos, eos and pad; leave "
                f"{', '.join('--' + r.replace('_', '-') for r in roles)} out"
            )
        wanted = {"gist_levels": gist_levels, "links": links}
        return write_sentencepiece(path.read_bytes(), output, **wanted, name=str(path), beside=path.parent, overwrite=overwrite)
    return _write_huggingface(path, output, gist_levels, links, roles or {}, overwrite)


def write_sentencepiece(
    raw: bytes, output: Path, *, gist_levels: int, links: int, name: str, beside: Path | None = None, overwrite: bool = False
) -> TokenizerInfo:
    """Write the directory of a sentencepiece model, with the gists and links that it lacks as control pieces at its end.

    The ids of the other pieces stay; a model that lacks none keeps its bytes.

    Args:
        beside: directory whose configuration and chat templates go with it.

    Raises:
        DataError: not a model, not convertible, or the name of a gist or link is taken by an ordinary piece.
    """
    model = parse_model(raw, name)
    kinds = model.SentencePiece
    if beside:
        _check_no_additions(beside / MODEL_FILE, {p.piece for p in model.pieces})
    control = {p.piece: i for i, p in enumerate(model.pieces) if p.type == kinds.CONTROL}
    ordinary = {p.piece for p in model.pieces} - set(control)
    check_gists(control, name)
    missing = missing_tokens(control, gist_levels, links)
    for token in missing:
        if token in ordinary:
            raise DataError(f"{name}: {token} is an ordinary piece, which a text could contain; it must be a control piece")
        model.pieces.add(piece=token, score=0.0, type=kinds.CONTROL)
    if missing:
        model.trainer_spec.vocab_size = len(model.pieces)
        raw = model.SerializeToString(deterministic=True)
    tokenizer = SentencePieceTokenizer(raw, name)
    info = tokenizer.info
    ids = {
        "bos_token": info.bos_id,
        "eos_token": info.eos_id,
        "pad_token": info.pad_id,
        "unk_token": model.trainer_spec.unk_id,
    }
    write_directory(
        output,
        tokenizer,
        tokenizer_json=to_huggingface(model, name).to_str(pretty=True).encode("utf-8"),
        model=raw,
        roles={role: model.pieces[i].piece for role, i in ids.items() if i is not None},
        overwrite=overwrite,
        **(_kept(beside, {p.piece for p in model.pieces}, dropped=("add_bos_token", "add_eos_token")) if beside else {}),
    )
    return info


def _write_huggingface(
    path: Path, output: Path, gist_levels: int, links: int, roles: dict[str, str], overwrite: bool
) -> TokenizerInfo:
    raw = path.read_bytes()
    before = HuggingFaceTokenizer.from_file(path, roles)
    special = {name: token.id for name, token in before.control.items()}
    have = len(before.info.gist_ids)
    if missing_tokens(special, gist_levels, links):
        _, inner = parse_tokenizer(raw, str(path))
        vocab = inner.get_vocab(with_added_tokens=True)
        check_gists(vocab, str(path))
        # Names that the vocabulary holds without marking them as special keep their ids, and become special.
        known = find_gists(vocab)[have:] if have < gist_levels else []
        known += [name for name in missing_tokens(special, have, links) if name in vocab]
        new = known + missing_tokens(vocab, gist_levels, links)
        inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in new])
        ids = [inner.token_to_id(token) for token in new]
        expected = [vocab[token] for token in known]
        first = max(vocab.values()) + 1
        expected += range(first, first + len(new) - len(known))
        if ids != expected:
            raise DataError(
                f"{path}: gists and links cannot be appended, because its vocabulary has gaps ({len(vocab)} entries, highest "
                f"id {first - 1}); fill them, or use --gist-levels {have} --links {len(before.info.link_ids)}"
            )
        raw = inner.to_str(pretty=True).encode("utf-8")
    tokenizer = HuggingFaceTokenizer(raw, before.roles, str(path))
    unk = {"unk_token": tokenizer.unk_token} if tokenizer.unk_token else {}
    write_directory(
        output,
        tokenizer,
        tokenizer_json=raw,
        model=None,
        roles=tokenizer.roles | unk,
        overwrite=overwrite,
        **_kept(path.parent, parse_tokenizer(raw, str(path))[1].get_vocab(with_added_tokens=True)),
    )
    return tokenizer.info


def _kept(source: Path, tokens: Container[str], dropped: Sequence[str] = ()) -> dict:
    """What goes with a tokenizer besides its vocabulary, as arguments of `write_directory`: its chat templates, and all settings
    but those that say how it was loaded, and special tokens that it does not have (transformers would append them)."""
    config: dict = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        values = read_json(source / name) if (source / name).exists() else {}
        config |= values if isinstance(values, dict) else {}
    known = lambda token: (token.get("content") if isinstance(token, dict) else token) in tokens
    kept = {}
    for key, value in config.items():
        if key in LOADING_KEYS or key in dropped:
            continue
        if key.endswith("_token") and isinstance(value, str | dict) and not known(value):
            continue
        if key.endswith("_special_tokens"):
            value = {k: v for k, v in value.items() if known(v)} if isinstance(value, dict) else list(filter(known, value or ()))
        kept[key] = value
    paths = [source / CHAT_TEMPLATE_FILE, *sorted((source / MORE_TEMPLATES).glob("*.jinja"))]
    if (source / INFO_FILE).exists():  # a directory of ours: what the import of a model put there
        paths.append(source / GENERATION_FILE)
    files = {str(p.relative_to(source)): p.read_bytes() for p in paths if p.is_file()}
    return {"extra_config": kept, "extra_files": files}


def _check_no_additions(path: Path, model_tokens: Container[str]) -> None:
    """Raise DataError where a file beside a sentencepiece model gives ids to tokens that it does not have."""
    extra = path.with_name("added_tokens.json")
    values = read_json(extra) if extra.exists() else {}
    if missing := [token for token in (values if isinstance(values, dict) else ()) if token not in model_tokens]:
        raise DataError(
            f"{extra}: has {missing[0]!r}, which {path.name} does not have; make a tokenizer.json of both with transformers "
            f"(AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained(NEW)) and import that"
        )
