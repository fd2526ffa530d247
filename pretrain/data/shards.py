"""The shards that a configuration names: found, fetched where they are remote, and held against the run's tokenizer."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unfold.data_prep.format.lazy import LazyShard, open_lazily
from unfold.pretrain.data.tokenizer import RunTokenizer
from unfold.pretrain.errors import UserError


def open_shards(entries: Sequence[str], tokenizer: RunTokenizer, setting: str, cache: str | Path = "") -> list[LazyShard]:
    """Open all shards that prefixes, globs and URLs name, in this order; each once. Parts of an array without a document are
    left out.

    Args:
        setting: the configuration key that named them, for messages.
        cache: where remote shards are kept; empty takes ``~/.cache/unfold/shards``.

    Raises:
        UserError: a shard is missing, cut short, of another tokenizer, or holds ids outside the vocabulary.
    """
    prefixes = list(dict.fromkeys(prefix for entry in entries for prefix in _find(entry, setting)))
    root = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "unfold" / "shards"

    def open_one(prefix: str) -> LazyShard:
        local = _fetch(prefix, root, setting) if "://" in prefix else prefix
        return _open(local, tokenizer, setting)

    with ThreadPoolExecutor(16) as pool:  # on a shared file system each open waits for the network
        opened = list(pool.map(open_one, prefixes))
    if filled := [shard for shard in opened if len(shard.lengths)]:
        return filled
    raise UserError(f"{setting}: {', '.join(entries)} holds no document; name other shards, or give the corpus more text")


def _find(entry: str, setting: str) -> list[str]:
    """Prefixes that an entry names: itself, or, where there is no such shard, what it matches as a pattern."""
    prefix = entry.removesuffix(".bin").removesuffix(".idx")
    if not glob.has_magic(entry) or ("://" not in entry and is_shard(prefix)):
        return [prefix]
    pattern = f"{prefix}.idx"
    if "://" in entry:
        fs, path = _file_system(entry, setting)
        if fs.exists(pattern.partition("://")[2]):
            return [prefix]
        found = [fs.unstrip_protocol(p) for p in fs.glob(pattern.partition("://")[2])]
    else:
        found = glob.glob(pattern, recursive=True)
    if not found:
        raise UserError(f"{setting}: {entry} matches no shard (no {pattern})")
    return sorted(path.removesuffix(".idx") for path in found)


def is_shard(prefix: str) -> bool:
    """Whether a file of a shard of this very name is there."""
    return any(os.path.isfile(prefix + suffix) for suffix in (".idx", ".bin", ".json"))


def _open(prefix: str, tokenizer: RunTokenizer, setting: str) -> LazyShard:
    """Open a shard and hold it against the tokenizer."""
    try:
        shard = open_lazily(prefix)
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from None
    info = shard.info
    if info.tokenizer_hash != tokenizer.hash:
        raise UserError(
            f"{setting}: {prefix} was made with another tokenizer (hash {info.tokenizer_hash[:12]}, data.tokenizer "
            f"{tokenizer.directory} has {tokenizer.hash[:12]}); name the tokenizer it was made with, or tokenize again"
        )
    if info.max_id >= tokenizer.vocab_size:
        raise UserError(f"{setting}: {prefix} holds token id {info.max_id}, the vocabulary has {tokenizer.vocab_size} ids")
    return shard


def _file_system(url: str, setting: str):
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # an unknown protocol, or its package is missing
        raise UserError(f"{setting}: {url} cannot be opened ({error})") from None


def _fetch(prefix: str, root: Path, setting: str) -> str:
    """Copy a remote shard into the cache unless it is there; returns the local prefix.

    Ranks of one machine share the cache: one copies, the others wait for it. The name has the hash of the sidecar, in which
    the hashes of the other files stand, so a shard that was replaced is fetched again.
    """
    fs, path = _file_system(prefix, setting)
    try:
        sidecar = fs.cat_file(path + ".json")
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {prefix}.json cannot be read ({error})") from None
    local = root / f"{Path(path).name}-{hashlib.sha256(sidecar).hexdigest()[:24]}"
    root.mkdir(parents=True, exist_ok=True)
    with open(f"{local}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        suffixes = (".bin", ".idx", *([".spans"] if b'"spans": {' in sidecar else []), ".json")
        if not all(os.path.isfile(f"{local}{suffix}") for suffix in suffixes):
            try:
                for suffix in suffixes:  # the sidecar last: what has one is whole
                    fs.get_file(path + suffix, f"{local}{suffix}.partial")
                    os.replace(f"{local}{suffix}.partial", f"{local}{suffix}")
            except OSError as error:
                raise UserError(f"{setting}: {prefix} cannot be fetched into {root} ({error})") from None
    return str(local)
