"""Several shards into one."""

from data_prep.errors import DataError
from data_prep.shards import ShardInfo, ShardWriter, blocks, open_shard
from data_prep.verify import verify_shard


def merge_shards(prefixes: list[str], output: str, *, overwrite: bool = False) -> ShardInfo:
    """Write the documents of several shards, in the order given, as one.

    Raises:
        DataError: a shard is damaged, they differ in tokenizer, vocabulary, dtype, end-of-document ids or supervision, or
            `output`
            exists or is one of them. Nothing is written then.
    """
    if output in prefixes:
        raise DataError(f"{output}: is an input of this merge, too; choose another --output")
    infos = []
    for prefix in prefixes:
        info, defects = verify_shard(prefix)
        if defects:
            raise DataError(defects[0])
        infos.append(info)
        for name in ("tokenizer_hash", "vocab_size", "dtype", "eos_appended", "supervised"):
            ours, first = getattr(info, name), getattr(infos[0], name)
            if ours != first:
                raise DataError(
                    f"{prefix}: {name} is {ours}, but {prefixes[0]} has {first}; only shards of one kind can be "
                    "merged: tokenize one of them again"
                )
    first = infos[0]
    sources = list(dict.fromkeys(source for info in infos for source in info.sources))
    with ShardWriter(
        output,
        vocab_size=first.vocab_size,
        tokenizer_hash=first.tokenizer_hash,
        eos_appended=first.eos_appended,
        sources=sources,
        overwrite=overwrite,
        supervised=first.supervised,
    ) as writer:
        for prefix in prefixes:
            shard, done = open_shard(prefix), 0
            for ids, lengths in blocks(shard):
                writer.append(ids, lengths, shard.spans and shard.spans[done : done + len(lengths)])
                done += len(lengths)
        return writer.finish()
