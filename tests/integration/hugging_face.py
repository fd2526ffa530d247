"""Hugging Face directories as users get them: random small models of every family, made and saved by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.model.families import MODELS, architecture
from unfold.model.hf.keys import hf_config

TEXT = "The state of the Union is strong, and the Congress shall meet in December. "
END = "<|endoftext|>"


def write_tokenizer(directory: Path, gists: tuple[str, ...] = ()) -> int:
    """A byte-level BPE tokenizer, without gists unless some are named; returns its number of ids."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    tokenizer.add_special_tokens([AddedToken(gist, normalized=False, special=True) for gist in gists])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(directory)
    return tokenizer.get_vocab_size()


def write_model(directory: Path, name: str, vocab_size: int, shard_size: str = "40KB", **changes):
    """A model of tests.model.families.MODELS with other random weights, saved in shards; returns it, in eval mode."""
    import transformers

    keys = hf_config(MODELS[name], "float32", None, None, None) | {"vocab_size": vocab_size} | changes
    kind = architecture(name)
    model = getattr(transformers, kind)(getattr(transformers, kind.replace("ForCausalLM", "Config"))(**keys)).eval()
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


def write_directory(directory: Path, name: str = "llama", spare: int = 0, gists: tuple[str, ...] = (), **changes):
    """Tokenizer and model; ``spare``: rows of the vocabulary beyond the tokenizer's ids. Returns the model."""
    return write_model(directory, name, write_tokenizer(directory, gists) + spare, **changes)
