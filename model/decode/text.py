"""Generated tokens as text: pieces that are certain, and stop strings wherever tokens break them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from unfold.model.decode.cost import Recorder
from unfold.model.decode.generation import Decoder, LiveSequence, Sampling

Decode = Callable[[list[int]], str]
# A character has at most four bytes, each perhaps a token of its own: what is longer incomplete never becomes one.
LONGEST_CHARACTER = 4
CONTEXT = 8  # tokens decoded before new ones: whether a piece begins with a space depends on what stands before it


class TextStream:
    """The text of one continuation, token by token.

    Args:
        decode: token ids to text.
        stops: texts that end the continuation; none of their text is given out.
        before: token ids that stand before the continuation.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], before: Sequence[int]):
        self.decode, self.stops = decode, [s for s in stops if s]
        self.stopped = False
        self.known = list(before[-CONTEXT:])  # tokens whose text was taken, and the last of them only
        self.fresh: list[int] = []  # tokens whose text is not certain yet
        self.held = ""  # text that may turn out to begin a stop string

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self.fresh.append(token)
        text = self._fresh_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.fresh) < LONGEST_CHARACTER:
            return ""
        return self._give(text)

    def finish(self) -> str:
        """The text that was held back, at the end of a continuation."""
        text = self._give(self._fresh_text()) if self.fresh and not self.stopped else ""
        text, self.held = text + self.held, ""
        return text

    def _fresh_text(self) -> str:
        return self.decode(self.known + self.fresh)[len(self.decode(self.known)) :]

    def _give(self, text: str) -> str:
        self.known, self.fresh = (self.known + self.fresh)[-CONTEXT:], []
        text = self.held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        kept = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def stream_text(
    decoder: Decoder,
    sequences: Sequence[LiveSequence],
    sampling: Sampling,
    decode: Decode,
    stop_ids: Sequence[int] = (),
    stops: Sequence[str] = (),
    recorder: Recorder | None = None,
) -> Iterator[tuple[int, str]]:
    """Continue sequences together; yields (number of the sequence, piece of text) as pieces become certain.

    Args:
        decoder, sequences, sampling, stop_ids: as for :meth:`Decoder.stream`.
        decode: token ids to text.
        stops: texts that end a sequence; they are not given out.
        recorder: notes when tokens come.
    """
    raw = lambda s: [i for i, l in zip(s.ids[-4 * CONTEXT :], s.level[-4 * CONTEXT :]) if l < 0] + s.pending
    streams = [TextStream(decode, stops, raw(sequence)) for sequence in sequences]
    ended: set[int] = set()
    tokens = decoder.stream(sequences, sampling, stop_ids, ended)
    for number, token in recorder.writing(tokens) if recorder else tokens:
        if piece := streams[number].push(token):
            yield number, piece
        if streams[number].stopped:
            ended.add(number)
    for number, stream in enumerate(streams):
        if piece := stream.finish():
            yield number, piece
