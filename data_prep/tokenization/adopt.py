"""Adopting an existing tokenizer: the same ids, with gist tokens after them."""

from pathlib import Path

from tokenizers import AddedToken

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.directory import write_directory
from unfold.data_prep.format.files import check_new_directory
from unfold.data_prep.format.tokenizer import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    INFO_FILE,
    JSON_FILE,
    MODEL_FILE,
    TokenizerInfo,
    find_gists,
    locate,
    read_json,
)
from unfold.data_prep.tokenization.convert import to_huggingface
from unfold.data_prep.tokenization.huggingface import HuggingFaceTokenizer, parse_tokenizer
from unfold.data_prep.tokenization.sentencepiece import SentencePieceTokenizer, parse_model

KEPT_CONFIG = ("chat_template", "model_max_length", "padding_side", "add_bos_token", "add_eos_token")


def import_tokenizer(
    source: str | Path,
    output: str | Path,
    *,
    gist_levels: int = 4,
    roles: dict[str, str] | None = None,
    overwrite: bool = False,
) -> TokenizerInfo:
    """Write a tokenizer directory for a sentencepiece .model or a Hugging Face tokenizer.json (or a directory of one).

    Args:
        gist_levels: levels that shall have a gist token; the vocabulary's missing ones are appended.
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
        return write_sentencepiece(
            path.read_bytes(), output, gist_levels=gist_levels, name=str(path), overwrite=overwrite
        )
    return _write_huggingface(path, output, gist_levels, roles or {}, overwrite)


def write_sentencepiece(
    raw: bytes, output: Path, *, gist_levels: int, name: str, overwrite: bool = False
) -> TokenizerInfo:
    """Write the directory of a sentencepiece model, with the gists that it lacks as control pieces at its end.

    The ids of the other pieces stay; a model that lacks no gist keeps its bytes.

    Raises:
        DataError: not a model, not convertible, or a gist's name is taken by an ordinary piece.
    """
    model = parse_model(raw, name)
    kinds = model.SentencePiece
    control = {p.piece: i for i, p in enumerate(model.pieces) if p.type == kinds.CONTROL}
    ordinary = {p.piece for p in model.pieces} - set(control)
    missing = [f"<gist{level}>" for level in range(len(find_gists(control)), gist_levels)]
    for gist in missing:
        if gist in ordinary:
            raise DataError(
                f"{name}: {gist} is an ordinary piece, which a text could contain; it must be a control piece"
            )
        model.pieces.add(piece=gist, score=0.0, type=kinds.CONTROL)
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
    )
    return info


def _write_huggingface(
    path: Path, output: Path, gist_levels: int, roles: dict[str, str], overwrite: bool
) -> TokenizerInfo:
    raw = path.read_bytes()
    before = HuggingFaceTokenizer.from_file(path, roles)
    have = len(before.info.gist_ids)
    if have < gist_levels:
        _, inner = parse_tokenizer(raw, str(path))
        vocab = inner.get_vocab(with_added_tokens=True)
        # Names that the vocabulary holds without marking them as special keep their ids, and become special.
        known = find_gists(vocab)[have:]
        new = known + [f"<gist{level}>" for level in range(have + len(known), gist_levels)]
        inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in new])
        ids = [inner.token_to_id(token) for token in new]
        expected = [vocab[token] for token in known]
        first = max(vocab.values()) + 1
        expected += range(first, first + len(new) - len(known))
        if ids != expected:
            raise DataError(
                f"{path}: gists cannot be appended, because its vocabulary has gaps "
                f"({len(vocab)} entries, highest id {first - 1}); fill them, or use --gist-levels {have}"
            )
        raw = inner.to_str(pretty=True).encode("utf-8")
    tokenizer = HuggingFaceTokenizer(raw, before.roles, str(path))
    config_path = path.parent / CONFIG_FILE
    config = read_json(config_path) if config_path.exists() else {}
    template = path.parent / CHAT_TEMPLATE_FILE
    unk = {"unk_token": tokenizer.unk_token} if tokenizer.unk_token else {}
    write_directory(
        output,
        tokenizer,
        tokenizer_json=raw,
        model=None,
        roles=tokenizer.roles | unk,
        extra_config={k: config[k] for k in KEPT_CONFIG if k in config} if isinstance(config, dict) else {},
        extra_files={template.name: template.read_bytes()} if template.exists() else {},
        overwrite=overwrite,
    )
    return tokenizer.info
