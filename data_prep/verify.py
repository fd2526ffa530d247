"""Checking shards against their sidecars: structure, hashes, id range, tokenizer."""

import hashlib
from pathlib import Path

import numpy as np

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.index import SUFFIXES, ShardInfo, shard_path, unigram_entropy
from unfold.data_prep.format.shards import Shard, blocks, open_shard
from unfold.data_prep.format.tokenizer import TokenizerInfo

BLOCK = 1 << 24


def verify_shard(prefix: str, tokenizer: TokenizerInfo | None = None) -> tuple[ShardInfo | None, list[str]]:
    """Check everything that can be checked.

    Args:
        tokenizer: if given, the shard must be of it.

    Returns:
        The sidecar (None if it cannot be read), and one line per defect; no line means that the shard is good.
    """
    try:
        info = ShardInfo.from_file(shard_path(prefix, ".json"))
    except DataError as e:
        if not any(shard_path(prefix, s).exists() for s in SUFFIXES):
            return None, [f"{prefix}: no such shard (there is no {prefix}.json, .idx or .bin)"]
        return None, [f"{e}; the shard is not complete: make it again"]
    defects = check_tokenizer(prefix, info, tokenizer) if tokenizer else []
    try:
        shard = open_shard(prefix, may_be_empty=True)
    except DataError as e:
        return info, [*defects, str(e)]
    for kind in info.files:
        path = shard_path(prefix, f".{kind}")
        if (found := file_hash(path)) != info.files[kind]["sha256"]:
            defects.append(f"{path}: sha256 {found[:12]}.. is not {info.files[kind]['sha256'][:12]}.. as in the sidecar; altered")
    return info, defects + _check_tokens(shard, tokenizer if not defects else None)


def check_tokenizer(prefix: str, info: ShardInfo, tokenizer: TokenizerInfo) -> list[str]:
    """One line if the shard was not made with this tokenizer."""
    if (info.tokenizer_hash, info.vocab_size) == (tokenizer.hash, tokenizer.vocab_size):
        return []
    return [
        f"{prefix}: made with another tokenizer (hash {info.tokenizer_hash[:12] or 'none'}.., {info.vocab_size} ids; "
        f"given: {tokenizer.hash[:12]}.., {tokenizer.vocab_size} ids); use the one it was made with, or tokenize again"
    ]


def file_hash(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check_tokens(shard: Shard, tokenizer: TokenizerInfo | None) -> list[str]:
    info, prefix = shard.info, shard.prefix
    if not len(shard.lengths):
        return []
    counts = np.zeros(max(info.vocab_size, 1), dtype=np.int64)
    for ids, _ in blocks(shard):
        bad = np.flatnonzero((ids < 0) | (ids >= info.vocab_size))
        if bad.size:
            return [f"{prefix}.bin: token id {ids[bad[0]]} does not fit the vocabulary of {info.vocab_size}"]
        counts += np.bincount(ids, minlength=len(counts))
    defects = []
    highest = int(np.flatnonzero(counts)[-1])
    if highest != info.max_id:
        defects.append(f"{prefix}.json: max_id {info.max_id}, but the highest id is {highest}")
    if not np.isclose(unigram_entropy(counts), info.unigram_entropy_nats):
        defects.append(f"{prefix}.json: unigram_entropy_nats {info.unigram_entropy_nats} is not that of the tokens")
    if tokenizer and info.eos_appended:
        last = shard.tokens[shard.starts + shard.lengths - 1]
        unended = np.flatnonzero(last != tokenizer.eos_id)
        if unended.size:
            defects.append(
                f"{prefix}.bin: document {unended[0]} does not end with id {tokenizer.eos_id}, "
                "the tokenizer's end of document, as the sidecar says"
            )
    return defects
