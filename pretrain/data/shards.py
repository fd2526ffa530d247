"""Token shards as training reads them: checked against their sidecars, opened by the thousand, fetched where they are remote.

Only sidecar and index are read at the start; a token file is mapped when the first sample needs it. No file is written
beside the shards, so any number of ranks may open the same ones at once.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unfold.pretrain.data.tokenizer import TokenizerInfo
from unfold.pretrain.errors import UserError

HEADER = struct.Struct("<9sQBQQ")  # of a megatron-core index: magic, version, dtype code, sequences, document borders
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {8: np.dtype(np.uint16), 4: np.dtype(np.int32)}
SPANS_HEADER = struct.Struct("<8sQQQ")  # of a supervised shard's spans: magic, version, documents, answer ranges
SPANS_MAGIC = b"UNFSPANS"


@dataclass
class Shard:
    """One shard; its token file is opened at the first read."""

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray  # int32 [documents]
    sha256: str  # of the token file; of a supervised shard of its spans, too
    spans_path: str = ""  # of a supervised shard
    _starts: np.ndarray | None = field(default=None, repr=False)
    _tokens: np.ndarray | None = field(default=None, repr=False)
    _spans: tuple[np.ndarray, np.ndarray, np.ndarray] | None = field(default=None, repr=False)

    def read(self, document: int, offset: int, out: np.ndarray) -> None:
        """Copy a document's tokens from ``offset`` on into out, int64 [length]."""
        if self._tokens is None:
            self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
            self._tokens = np.memmap(self.prefix + ".bin", self.dtype, mode="r")
        begin = int(self._starts[document]) + offset
        out[:] = self._tokens[begin : begin + len(out)]

    def spans(self, document: int) -> tuple[int, np.ndarray] | None:
        """(tokens of its context, its answers' tokens [begin, end), int32 [ranges, 2]); None unless supervised."""
        if not self.spans_path:
            return None
        if self._spans is None:
            self._spans = _map_spans(self.spans_path, len(self.lengths))
        first, context, ranges = self._spans
        return int(context[document]), np.array(ranges[first[document] : first[document + 1]])


def _map_spans(path: str, documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of each document's first range, int64 [documents + 1]; contexts, int32 [documents]; ranges, int32 [N, 2]."""
    raw = np.memmap(path, np.uint8, mode="r")
    at = SPANS_HEADER.size + 8 * (documents + 1)
    context = raw[at : at + 4 * documents].view("<i4")
    return raw[SPANS_HEADER.size : at].view("<i8"), context, raw[at + 4 * documents :].view("<i4").reshape(-1, 2)


def open_shards(entries: Sequence[str], tokenizer: TokenizerInfo, setting: str, cache: str | Path = "") -> list[Shard]:
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

    def open_one(prefix: str) -> Shard:
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


def _open(prefix: str, tokenizer: TokenizerInfo, setting: str) -> Shard:
    """Check a shard against its sidecar and the tokenizer without reading its tokens."""
    for suffix in (".bin", ".idx", ".json"):
        if not os.path.isfile(prefix + suffix):
            raise UserError(f"{setting}: {prefix}{suffix} does not exist; make the shard with `python -m data_prep tokenize`")
    sidecar = f"{prefix}.json"
    try:
        meta = json.loads(Path(sidecar).read_text())
        files, shard_hash, max_id = meta["files"], meta["tokenizer_hash"], meta["max_id"]
        kinds = ["bin", "idx", *(["spans"] if "spans" in files else [])]
        sizes = {kind: files[kind]["bytes"] for kind in kinds}
        sha256 = files["bin"]["sha256"]
        if "spans" in files:
            sha256 = hashlib.sha256((sha256 + files["spans"]["sha256"]).encode()).hexdigest()
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}: {sidecar} is damaged ({error}); make the shard again") from None
    for suffix, expected in sizes.items():
        if not os.path.isfile(f"{prefix}.{suffix}"):
            raise UserError(f"{setting}: {prefix}.{suffix} does not exist; restore it or make the shard again")
        if (size := os.path.getsize(f"{prefix}.{suffix}")) != expected:
            raise UserError(
                f"{setting}: {prefix}.{suffix} has {size} bytes, {expected} were written; restore it or make it again"
            )
    if shard_hash != tokenizer.hash:
        raise UserError(
            f"{setting}: {prefix} was made with another tokenizer (hash {shard_hash[:12]}, data.tokenizer "
            f"{tokenizer.directory} has {tokenizer.hash[:12]}); name the tokenizer it was made with, or tokenize again"
        )
    if max_id >= tokenizer.vocab_size:
        raise UserError(f"{setting}: {prefix} holds token id {max_id}, the vocabulary has {tokenizer.vocab_size} ids")
    dtype, lengths = _read_index(prefix, sizes["bin"], setting)
    if "spans" not in sizes:
        return Shard(prefix, dtype, lengths, sha256)
    _check_spans(f"{prefix}.spans", len(lengths), sizes["spans"], setting)
    return Shard(prefix, dtype, lengths, sha256, f"{prefix}.spans")


def _check_spans(path: str, documents: int, size: int, setting: str) -> None:
    with open(path, "rb") as file:
        header = file.read(SPANS_HEADER.size)
    magic, version, told, ranges = SPANS_HEADER.unpack(header) if len(header) == SPANS_HEADER.size else (b"", 0, 0, 0)
    whole = SPANS_HEADER.size + 8 * (documents + 1) + 4 * documents + 8 * ranges
    if (magic, version, told, size) != (SPANS_MAGIC, 1, documents, whole):
        raise UserError(f"{setting}: {path} does not belong to the shard beside it; restore it or make the shard again")


def _read_index(prefix: str, tokens_bytes: int, setting: str) -> tuple[np.dtype, np.ndarray]:
    """Data type and document lengths, int32 [documents]."""
    with open(f"{prefix}.idx", "rb") as file:
        header = file.read(HEADER.size)
        magic, version, code, sequences, _ = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0, 0, 0)
        lengths = np.frombuffer(file.read(4 * sequences), np.int32) if magic == MAGIC and version == 1 else np.empty(0, np.int32)
    dtype = DTYPES.get(code)
    if dtype is None or len(lengths) != sequences or int(lengths.sum(dtype=np.int64)) * dtype.itemsize != tokens_bytes:
        raise UserError(f"{setting}: {prefix}.idx does not belong to {prefix}.bin; restore it or make the shard again")
    return dtype, lengths


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
