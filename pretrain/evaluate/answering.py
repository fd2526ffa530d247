"""Questions on contexts: a context is folded and closed, a question on it recalls; continuations are written, or weighed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from unfold.pretrain.data.chat import shown_prompt
from unfold.pretrain.evaluate.subject import Subject, Variant

if TYPE_CHECKING:
    from unfold.model.decode.generation import Decoder, LiveSequence


class Reader:
    """Reads with one variant of a model.

    Attributes:
        decoder: what reads.
        recorder: what it costs, from the making of the reader on.
    """

    def __init__(self, subject: Subject, variant: Variant):
        from unfold.model.decode.cost import Recorder

        self._subject = subject
        self.decoder: Decoder = subject.decoder(variant)
        self.recorder = Recorder(self.decoder.device)

    def read(self, context: Sequence[int], question: Sequence[int]) -> LiveSequence:
        """A sequence whose context was closed and whose question was read, ready to be continued."""
        with self.recorder.reading():
            sequence = self.decoder.start()
            self.decoder.read_context(sequence, context)
            self.decoder.read_suffix(sequence, question)
        return sequence

    def write(self, sequence: LiveSequence, max_new_tokens: int) -> str:
        """The likeliest continuation, until the end of text; the sequence is left as it was."""
        from unfold.model.decode.generation import Sampling

        stops = self._subject.tokenizer.stop_ids
        written = self.decoder.stream([copy.deepcopy(sequence)], Sampling(max_new_tokens), stops)
        return self._subject.decode([token for _, token in self.recorder.writing(written)])

    def weigh(self, sequence: LiveSequence, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Log-likelihood of each candidate continuation, nats; the sequence is left as it was."""
        branches = [copy.deepcopy(sequence) for _ in candidates]
        totals = [0.0] * len(candidates)
        for place in range(max(map(len, candidates))):
            running = [i for i, candidate in enumerate(candidates) if place < len(candidate)]
            if place:
                for i in running:
                    branches[i].pending = [candidates[i][place - 1]]
                self.decoder.step([branches[i] for i in running])
            for i in running:
                totals[i] += float(branches[i].logits.float().log_softmax(-1)[candidates[i][place]])
        return totals


class Question(Protocol):
    """What is read before an answer: raw tokens."""

    context: list[int]
    question: list[int]


def show_prompts(subject: Subject, prompts: Mapping[str, Question]) -> Iterator[str]:
    """Lines for ``--show-prompt``: some questions as they are read, each under its name."""
    for name, prompt in prompts.items():
        yield f"--- {name}"
        yield from shown_prompt(subject.show, prompt.context, prompt.question)
