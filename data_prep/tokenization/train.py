"""Training a sentencepiece tokenizer on a corpus."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from unfold.data_prep.corpus.readers import read_documents
from unfold.data_prep.corpus.sources import Source
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.files import check_new_directory
from unfold.data_prep.format.text import encodable
from unfold.data_prep.format.tokenizer import INFO_FILE, TokenizerInfo, missing_tokens
from unfold.data_prep.tokenization.adopt import write_sentencepiece

MAX_LINE = 4000  # bytes; sentencepiece drops longer lines without a word, so they are cut here
BYTES, SPECIALS = 256, 4


def train_tokenizer(
    sources: list[Source],
    output: str | Path,
    *,
    vocab_size: int,
    gist_levels: int = 4,
    links: int = 0,
    model_type: str = "bpe",
    user_symbols: tuple[str, ...] = (),
    split_digits: bool = False,
    character_coverage: float = 0.9995,
    max_lines: int = 0,
    overwrite: bool = False,
) -> TokenizerInfo:
    """Train a tokenizer and write its directory. The same input gives the same bytes, on any machine.

    Args:
        sources: the corpus (`sources.find_sources`).
        vocab_size: the total: pieces, 256 bytes, unk, bos, eos, pad, gists, links and user symbols.
        gist_levels: how many gist tokens there are, `<gist0>` and up.
        links: how many link tokens there are, `<link1>` and up.
        model_type: 'bpe' or 'unigram'.
        user_symbols: pieces that are always kept whole, and that a text can contain.
        max_lines: train on a sample of so many lines; 0 takes all of them.

    Raises:
        DataError: a setting or an input that cannot do.
    """
    output = Path(output)
    check_new_directory(output, overwrite, INFO_FILE)
    reserved = missing_tokens({}, gist_levels, links)
    _check_symbols(user_symbols, reserved)
    least = BYTES + SPECIALS + len(reserved) + len(user_symbols) + 1
    if vocab_size < least:
        raise DataError(f"--vocab-size {vocab_size}: too small; bytes, specials, gists, links and symbols alone need {least}")
    controls = "".join(reserved) + "<unk><s></s><pad><0x0123456789ABCDEF>"
    raw = io.BytesIO()
    stopped: list[DataError] = []  # sentencepiece makes an error of its own of what ends its input
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(_texts(sources, stopped)),
            model_writer=raw,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=split_digits,
            control_symbols=reserved,
            user_defined_symbols=list(user_symbols),
            pad_id=3,
            max_sentence_length=MAX_LINE + 8,
            input_sentence_size=max_lines,
            shuffle_input_sentence=max_lines > 0,
            # Unigram spells out a literal control token rightly in every library only if its characters are pieces.
            required_chars="".join(sorted(set(controls))) if model_type == "unigram" else "",
            num_threads=1,  # recorded in the model, and sums of several threads differ in their last bits
            minloglevel=2,
        )
    except RuntimeError as e:
        if stopped:
            raise stopped[0] from None
        raise _explained(e, vocab_size) from None
    return write_sentencepiece(
        raw.getvalue(), output, gist_levels=gist_levels, links=links, name=str(output), overwrite=overwrite
    )


def _texts(sources: list[Source], stopped: list[DataError]) -> Iterator[str]:
    """All texts. Of one that cannot be read, or is not all characters, the error (with file and line) is put into ``stopped``
    and raised."""
    try:
        for document in read_documents(sources):
            if problem := encodable(document.text):
                raise DataError(f"{sources[document.source].place(document.line)}: {problem}")
            yield document.text
    except DataError as error:
        stopped.append(error)
        raise


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of texts, without their ends; long ones cut before a space, so that words keep their space marks."""
    for text in texts:
        for line in text.split("\n"):
            while len(line.encode("utf-8", "replace")) > MAX_LINE:
                cut = line.rfind(" ", 1, MAX_LINE // 4)  # a character has at most 4 bytes
                cut = cut if cut > 0 else MAX_LINE // 4
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


def _check_symbols(user_symbols: tuple[str, ...], reserved: list[str]) -> None:
    taken = {*reserved, "<unk>", "<s>", "</s>", "<pad>"}
    for symbol in user_symbols:
        if not symbol or any(c.isspace() for c in symbol) or symbol in taken:
            raise DataError(f"--user-symbols {symbol!r}: must not be empty, hold whitespace, or be one of {sorted(taken)}")
    if len(set(user_symbols)) < len(user_symbols):
        raise DataError(f"--user-symbols {' '.join(user_symbols)}: one is named twice")


def _explained(error: RuntimeError, vocab_size: int) -> DataError:
    """Sentencepiece's message in words of this command line."""
    message = str(error)
    if "too high" in message:
        most = re.search(r"<= (\d+)", message)
        return DataError(
            f"--vocab-size {vocab_size}: more pieces than this corpus yields; "
            + (f"at most {most[1]} would do" if most else "give a smaller one, or more text")
        )
    if "smaller than required_chars" in message:
        needed = re.search(r"\d+ vs (\d+)", message)
        return DataError(
            f"--vocab-size {vocab_size}: the corpus' characters alone need "
            f"{needed[1] if needed else 'more'}; raise it, or lower --character-coverage"
        )
    if "sentences_.empty()" in message:
        return DataError("--input: there is no text in the given files; a tokenizer cannot be trained on nothing")
    return DataError(f"sentencepiece could not train: {message.strip().splitlines()[-1]}")
