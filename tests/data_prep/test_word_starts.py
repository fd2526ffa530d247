"""The word-start bitmap, made from pieces."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from unfold.data_prep.tokenization.adopt import import_tokenizer
from unfold.data_prep.tokenization.word_starts import byte_alphabet, bytes_start_word, huggingface_word_starts, text_starts_word


@pytest.mark.parametrize("text", ["▁the", "▁", " the", "\n", "\t", "\u00a0x", "\u3000", ",", "(a", "“", "。", "$", "+1"])
def test_texts_that_start_words(text):
    assert text_starts_word(text) and bytes_start_word(text.encode())


@pytest.mark.parametrize("text", ["the", "ing", "7", "é", "日", "\u0301", "\u200d", ""])
def test_texts_that_do_not(text):
    assert not text_starts_word(text) and not bytes_start_word(text.encode())


@pytest.mark.parametrize("raw", [b"\xe2\x80", b"\xe2", b"\x80", b"\xa0x", b"\xf0\x9f\x98", b"\xff", b"\xc0 "])
def test_cut_characters_do_not(raw):
    assert not bytes_start_word(raw)


def test_byte_alphabet_is_that_of_the_library():
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in (" a\n\t\r", "é日😀", "".join(map(chr, range(128)))):
        mapped = "".join(piece for piece, _ in pre.pre_tokenize_str(text))
        assert bytes(byte_alphabet()[c] for c in mapped) == text.encode()


def test_sentencepiece_bitmap(bpe, load):
    tokenizer = load(bpe)
    starts = np.load(bpe / "word_starts.npy")
    assert starts.dtype == bool and starts.shape == (1500,) and np.array_equal(starts, tokenizer.word_starts())
    pieces = {p.piece: i for i, p in enumerate(tokenizer._model.pieces)}
    for piece in (
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "<gist0>",
        "<gist2>",
        "<|user|>",
        "<0x0A>",
        "<0x20>",
        "<0x2C>",
        "▁the",
        ",",
        "▁",
    ):
        assert starts[pieces[piece]], piece
    for piece in ("<0x41>", "<0x30>", "<0x80>", "<0xC3>", "<0xE2>", "<0xF0>", "ing", "e", "7"):
        assert not starts[pieces[piece]], piece


def test_words_of_a_text_start_where_the_bitmap_says(any_tokenizer, load):
    tokenizer = load(any_tokenizer)
    ids = tokenizer.encode_batch(["The extraordinarily naïve people\nunderstand 日本, quickly."])[0]
    words, word = [], []
    for i, starts in zip(ids.tolist(), tokenizer.word_starts()[ids], strict=True):
        if starts and word:
            words.append(tokenizer.decode(word))
            word = []
        word.append(i)
    words.append(tokenizer.decode(word))
    found = [w.strip() for w in words if w.strip()]
    assert found == ["The", "extraordinarily", "naïve", "people", "understand", "日本", ",", "quickly", "."]


def test_byte_level_bitmap(byte_level, tmp_path):
    import_tokenizer(byte_level, tmp_path / "t", gist_levels=2)
    starts = np.load(tmp_path / "t" / "word_starts.npy")
    vocab = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json")).get_vocab()
    assert starts.shape == (1202,)
    for piece in ("Ġthe", "Ġ", "Ċ", "ĉ", ",", "<|endoftext|>", "<gist0>", "<gist1>"):
        assert starts[vocab[piece]], piece
    for piece in ("ing", "e", "7", "Ã", "Ģ", "â"):
        assert not starts[vocab[piece]], piece


def test_wordpiece_bitmap():
    vocab = {"[UNK]": 0, "the": 1, "##ing": 2, ",": 3, "##,": 4}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    starts = huggingface_word_starts(tokenizer.to_str().encode(), vocab)
    assert starts.tolist() == [True, True, False, True, False]
