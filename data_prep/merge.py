"""Several shards into one: token bytes are taken over as they are, in one pass that checks them, and the index is made anew."""

import hashlib

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.index import shard_path
from unfold.data_prep.format.shards import Shard, ShardInfo, ShardWriter, blocks, open_shard
from unfold.data_prep.verify import file_hash


def merge_shards(prefixes: list[str], output: str, *, overwrite: bool = False) -> ShardInfo:
    """Write the documents of several shards, in the order given, as one.

    Raises:
        DataError: a shard is damaged, they differ in tokenizer, vocabulary, dtype, end-of-document ids or supervision, none
            holds a document, or `output` exists or is one of them. No output is left then.
    """
    if output in prefixes:
        raise DataError(f"{output}: is an input of this merge, too; choose another --output")
    shards = [open_shard(prefix, may_be_empty=True) for prefix in prefixes]
    first = shards[0].info
    for shard in shards[1:]:
        _check_same_kind(shard, shards[0])
    if not any(len(shard.lengths) for shard in shards):
        raise DataError(
            f"{output}: not one document in {len(shards)} shards, from {prefixes[0]} on; give more documents, or, if these are "
            "the ones held out, a larger --valid-fraction"
        )
    sources = list(dict.fromkeys(source for shard in shards for source in shard.info.sources))
    with ShardWriter(
        output,
        vocab_size=first.vocab_size,
        tokenizer_hash=first.tokenizer_hash,
        eos_appended=first.eos_appended,
        sources=sources,
        overwrite=overwrite,
        supervised=first.supervised,
    ) as writer:
        for shard in shards:
            _append(writer, shard)
        return writer.finish()


def _check_same_kind(shard: Shard, first: Shard) -> None:
    for name in ("tokenizer_hash", "vocab_size", "dtype", "eos_appended", "supervised"):
        ours, others = getattr(shard.info, name), getattr(first.info, name)
        if ours != others:
            raise DataError(
                f"{shard.prefix}: {name} is {ours}, but {first.prefix} has {others}; only shards of one kind can be "
                "merged: tokenize one of them again"
            )


def _append(writer: ShardWriter, shard: Shard) -> None:
    """Append all documents; the shard's hashes are compared on the way, so that its tokens are read once."""
    hashes, done = {"bin": hashlib.sha256()}, 0
    for ids, lengths in blocks(shard):
        hashes["bin"].update(ids)
        writer.append(ids, lengths, shard.spans and shard.spans[done : done + len(lengths)])
        done += len(lengths)
    found = {kind: hashes[kind].hexdigest() if kind in hashes else file_hash(shard_path(shard.prefix, f".{kind}"))
             for kind in shard.info.files}  # fmt: skip
    for kind, digest in found.items():
        if digest != (expected := shard.info.files[kind]["sha256"]):
            raise DataError(
                f"{shard_path(shard.prefix, f'.{kind}')}: sha256 {digest[:12]}.. is not {expected[:12]}.. as in the "
                "sidecar; altered"
            )
