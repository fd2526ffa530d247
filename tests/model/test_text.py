"""Tokens to text: characters of several tokens, stop strings across tokens."""

import pytest

from tests.model.decoding import make_decoder, text
from unfold.model.config import GistConfig
from unfold.model.decode.generation import Sampling
from unfold.model.decode.text import TextStream, stream_text

bytewise = lambda ids: bytes(ids).decode("utf-8", errors="replace")
PIECES = [" the", " cat", "s", " sat", ".", "\n", " EN", "D", "."]


def wordwise(ids):
    """Like a sentencepiece decoder: the first piece loses its space."""
    return "".join(PIECES[i] for i in ids).removeprefix(" ")


def pieces(decode, ids, stops=(), before=()):
    stream, out = TextStream(decode, stops, before), []
    for i in ids:
        if stream.stopped:
            break
        out.append(stream.push(i))
    return [*out, stream.finish()]


def test_characters_come_whole():
    said = "na\u00efve \u4e16\U0001f30d!"
    got = pieces(bytewise, said.encode())
    assert "".join(got) == said and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in got)
    assert [p for p in got if p] == list(said)


def test_bytes_that_are_no_character_do_not_wait_for_ever():
    stream = TextStream(bytewise, (), ())
    given = "".join(stream.push(0xE4) for _ in range(12))
    assert given.count("\N{REPLACEMENT CHARACTER}") >= 8
    cut = TextStream(bytewise, (), ())
    assert cut.push(0xF0) == "" and cut.push(0x9F) == "" and cut.finish() == "\N{REPLACEMENT CHARACTER}"


def test_spaces_are_those_of_the_whole_text():
    ids = [0, 1, 2, 3, 4, 5, 0, 1, 4, 0, 3, 4]
    assert "".join(pieces(wordwise, ids)) == wordwise(ids)
    assert "".join(pieces(wordwise, ids[3:], before=ids[:3])) == wordwise(ids)[len(wordwise(ids[:3])) :] and ids[3] == 3


@pytest.mark.parametrize(
    "said,stops,given",
    [
        ("a cat. END. more", ["END"], "a cat. "),
        ("EN EN EEND more", ["END"], "EN EN E"),
        ("one two three", ["two", "one t"], ""),
        ("one tw", ["two", "twice"], "one tw"),
        ("abab abac!", ["abac"], "abab "),
        ("nothing", [], "nothing"),
        ("\u4e16\u754c\u4e16", ["\u754c"], "\u4e16"),
    ],
)
def test_stop_strings(said, stops, given):
    assert "".join(pieces(bytewise, said.encode(), stops)) == given


def test_stop_string_across_tokens_is_never_shown():
    got = pieces(wordwise, [0, 1, 6, 7, 8, 3], ["END."], before=[4])
    assert got == [" the", " cat", " ", "", "", ""]


def test_batch_stops_each_on_its_own(build):
    decoder = make_decoder(build, GistConfig((4, 2), recall="suffix"), grow=True)

    def start(number):
        sequence = decoder.start()
        decoder.read_context(sequence, text(20 + 9 * number, number))
        decoder.read_suffix(sequence, text(3, number))
        return sequence

    decode = lambda ids: "".join(f"<{i}>" for i in ids)
    whole = ["", ""]
    for number, piece in stream_text(decoder, [start(0), start(1)], Sampling(20, 1.0), decode):
        whole[number] += piece
    assert whole[0] != whole[1]
    stop = "><".join(whole[0].split("><")[4:6])  # runs over two tokens
    short = ["", ""]
    for number, piece in stream_text(decoder, [start(0), start(1)], Sampling(20, 1.0), decode, stops=[stop]):
        short[number] += piece
    assert short == [text[: text.find(stop)] if stop in text else text for text in whole]
    assert len(short[0]) < len(whole[0])
