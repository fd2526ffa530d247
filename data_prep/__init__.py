"""Corpora to tokenizers to token shards.

Nothing here knows about models, or where gists go: a shard holds raw tokens only, so that a corpus tokenised once
serves every chunk size. Entry points for Python: `tokenizer.load_tokenizer`, `train.train_tokenizer`,
`adopt.import_tokenizer`, `encode.tokenize_corpus`, `shards.write_shard`, `shards.open_shard`, `verify.verify_shard`,
`merge.merge_shards`.
"""
