"""Reading and continuing sequences with a cache: contexts are folded, later tokens recall (docs/method.md#generation)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from unfold.model.decode.cache import CachedJoinedOutline, CachedOutline, SequenceCache
from unfold.model.decode.live import LiveSequence
from unfold.model.decode.parts import identity_of, join, part_of
from unfold.model.decode.prefill import PrefillAttention
from unfold.model.decode.rounds import FrameRounds, Rounds, frames_of
from unfold.model.decode.sampling import Sampling
from unfold.model.decode.step import NewTokens, StepAttention
from unfold.model.gist import GistConfig, select_rule
from unfold.model.gist.growing import Feed, GistPlacement, Sight, raw_feed
from unfold.model.gist.parts import Identity, Part, check_parts
from unfold.model.transformer import Transformer

PREFILL = 1024  # interleaved tokens read at a time: bounds the memory of a prefill


class Decoder:
    """A model with what it takes to read and continue sequences.

    Args:
        model: on one rank, in eval mode.
        gist: how contexts are folded and who recalls; None for a dense model.
        gist_ids: every gist id of the vocabulary, level 0 first; none of them is ever emitted.
        word_starts: [vocab] bool; None where nothing asks for it: for a dense model, or without ``gist.word_aware``.
        grow: whether suffixes and generated text get gists as their chunks close; else a suffix, and what is generated
            after it, is one open chunk whose tokens see one another.
        link_ids: of the links of one part, in order; empty: parts are joined without links.
        raw_cache: where keys and values of raw tokens are kept: 'device', or 'host', from where what is unfolded is fetched.
            Gists are always on the device.
        capture: on a GPU, replay steps from CUDA graphs, each compared with the step itself at its first use and at times after
            it; without it steps are launched operation by operation, as on a CPU.
    """

    def __init__(
        self,
        model: Transformer,
        gist: GistConfig | None,
        gist_ids: Sequence[int],
        word_starts: np.ndarray | None,
        grow: bool = False,
        link_ids: Sequence[int] = (),
        raw_cache: str = "device",
        capture: bool = True,
    ):
        if raw_cache not in ("device", "host"):
            raise ValueError(f"raw_cache: {raw_cache!r} is not one of device, host")
        if raw_cache == "host" and gist is None:
            raise ValueError("raw_cache: 'host', but a dense model reads every raw token at every step; use 'device'")
        self.model, self.gist, self.gist_ids = model, gist, list(gist_ids)
        self.word_starts, self.grow = word_starts, grow
        self.vocabulary = model.config.vocab_size if word_starts is None else len(word_starts)
        self.link_ids, self.raw_on_host = list(link_ids), raw_cache == "host"
        self.rule = select_rule(gist) if gist and gist.recall != "none" else None
        self.first = gist.recall_from if gist else 1  # layer that recalls
        weight = model.head_weight
        self.device, self.dtype = weight.device, weight.dtype
        self.never = torch.tensor(self.gist_ids, dtype=torch.int64, device=self.device)
        self.frames = frames_of(self, capture)

    def start(self) -> LiveSequence:
        """A new, empty sequence."""
        return self._sequence(CachedOutline(self.gist))

    @cached_property
    def identity(self) -> Identity:
        """Of this model and tokenizer; only the parts that they read can be joined here. Needs gists."""
        own = self.gist_ids[: self.gist.levels]
        return identity_of(self.model, self.model.config, self.gist, own, self.word_starts)

    def read_part(self, tokens: Sequence[int]) -> Part:
        """Read a document by itself, closed, to be joined with others by :meth:`join`.

        Raises:
            ValueError: the model is dense, or there is no token.
        """
        if self.gist is None:
            raise ValueError("parts: need a model with gists; a dense one reads its documents every time")
        if not tokens:
            raise ValueError("document: has no token; leave it out")
        sequence = self._sequence(CachedOutline(self.gist), whole=True)
        self.read_context(sequence, tokens)
        return part_of(self.identity, tokens, sequence.cache).to(self.device, self.raw_on_host)

    @torch.no_grad()
    def join(self, parts: Sequence[Part], prefix: Sequence[int] = ()) -> LiveSequence:
        """A new sequence of a prefix, parts that were read before, in any order, and their links; a suffix is read next.

        Only prefix and links pass through the model.

        Args:
            parts: any number of them; one may stand there more than once.
            prefix: raw tokens before them, such as a system prompt; links and suffix see all of it, the parts nothing.

        Raises:
            ValueError: another model or tokenizer read a part, all of them take more positions than the model is meant for, or
                the decoder grows gists, which a suffix after parts does not get.
        """
        if self.gist is None or self.grow:
            need = "no grow" if self.gist else "a model with gists"
            raise ValueError(f"parts: need {need}; they are read with gists, and what follows them gets none")
        links = [link for _ in parts for link in self.link_ids]
        check_parts(self.identity, parts, len(prefix) + len(links), self.model.config.max_position, "max_position")
        outline = CachedJoinedOutline(self.gist, len(prefix), [part.shape for part in parts], len(self.link_ids))
        sequence = self._sequence(outline)
        self._check_tokens(prefix)
        for start in range(0, len(prefix), PREFILL):
            end = min(start + PREFILL, len(prefix))
            self._read_raw(sequence, prefix[start:end], outline.prefix_sight(start, end))
        for part in parts:
            level, raw = part.shape.level.tolist(), iter(part.ids)
            sequence.level += level
            sequence.ids += [next(raw) if l < 0 else self.gist_ids[l] for l in level]
            sequence.recalls += [self.gist.recall == "all" and l < 0 for l in level]
        if parts:
            join(sequence.cache, parts, self.model.config)
        for start in range(0, len(links), PREFILL):
            run = links[start : start + PREFILL]
            self._read_raw(sequence, run, outline.read_links(len(run)))
        return sequence

    def _read_raw(self, sequence: LiveSequence, tokens: Sequence[int], sight: Sight) -> None:
        """Read tokens of a joined text that do not recall."""
        sequence.ids += tokens
        sequence.level += [-1] * len(tokens)
        sequence.recalls += [False] * len(tokens)
        attend = PrefillAttention(sequence.cache, sight, None, self.first, self.device)
        sequence.logits = self.model.head_logits(self._run(list(tokens), sight.position, attend)[-1])

    def _sequence(self, outline: CachedOutline | CachedJoinedOutline, whole: bool = False) -> LiveSequence:
        placement = GistPlacement(self.gist, self.word_starts, self.gist_ids[: self.gist.levels]) if self.gist else None
        cache = SequenceCache(self.model.config, outline, self.dtype, self.device, self.raw_on_host, whole)
        return LiveSequence(cache, placement)

    def read_context(self, sequence: LiveSequence, tokens: Sequence[int], close: bool = True) -> None:
        """Fold raw tokens into gists; they recall only under ``recall: all``.

        A suffix before them (a question and its answer, of a former turn) is folded with them.

        Args:
            sequence: extended in place.
            tokens: any number of them.
            close: give the end a gist at every level, as before a question; without it the text may simply go on.
        """
        if isinstance(sequence.cache.outline, CachedJoinedOutline):
            raise ValueError("sequence: was joined of parts, and takes suffixes only; read a further document as a part")
        self._begin(sequence, tokens)
        recalls = self.rule is not None and self.gist.recall == "all"
        self._prefill(sequence, raw_feed(tokens, False) if self.gist is None else sequence.placement.push(tokens, recalls, close))

    def read_suffix(self, sequence: LiveSequence, tokens: Sequence[int]) -> None:
        """Read raw tokens after the context, such as a question; they recall unless the configuration's ``recall`` is none."""
        self._begin(sequence, tokens)
        self._prefill(sequence, self._suffix_feed(sequence, tokens))

    @torch.no_grad()
    def stream(
        self,
        sequences: Sequence[LiveSequence],
        sampling: Sampling,
        stop_ids: Sequence[int] = (),
        ended: set[int] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Continue sequences together; yields (number of the sequence, token) as tokens are chosen, in rounds.

        Args:
            sequences: of any lengths, each with at least one token.
            sampling: how tokens are chosen, and how many.
            stop_ids: a token that ends its sequence; it is neither yielded nor kept.
            ended: sequences whose numbers the caller puts here, while iterating, take no further token.
        """
        ended = set() if ended is None else ended
        for number, sequence in enumerate(sequences):
            if sequence.logits is None and not sequence.pending:
                raise ValueError(f"sequences: number {number} is empty; it needs at least one token to be continued")
        rounds = (FrameRounds if self.frames else Rounds)(self, sequences, sampling)
        try:
            for left in reversed(range(sampling.max_new_tokens)):
                running = [n for n in range(len(sequences)) if n not in ended]
                if not running:
                    return
                for n, token in zip(running, rounds.tokens(running, last=left == 0)):
                    if token in stop_ids:
                        ended.add(n)
                        continue
                    sequences[n].pending = [token]
                    yield n, token
        finally:
            rounds.close()

    @torch.no_grad()
    def step(self, sequences: Sequence[LiveSequence]) -> None:
        """Read the pending tokens of some sequences, all in one pass of the model; each attends to its own cache."""
        if not sequences:
            return
        if self.frames:
            FrameRounds(self, sequences, None).read()
            return
        batch, ids, last = [], [], []
        for sequence in sequences:
            feed = self.feed_pending(sequence)
            sequence.take(feed)
            batch.append(NewTokens(sequence.cache, sequence.cache.outline.append(feed.level, feed.recalls)))
            last.append(len(ids) + batch[-1].last_raw)
            ids += feed.ids
        position = torch.cat([new.sight.position for new in batch])
        hidden = self._run(ids, position, StepAttention(batch, self.rule, self.first))
        for sequence, logits in zip(sequences, self.model.head_logits(hidden[last])):
            sequence.logits = logits

    def feed_pending(self, sequence: LiveSequence) -> Feed:
        """What a sequence reads with its pending tokens, which are none any more."""
        tokens, sequence.pending = sequence.pending, []
        return self._suffix_feed(sequence, tokens)

    def certain(self, sequence: LiveSequence) -> bool:
        """Whether the next token is all that a sequence then reads, whatever it is."""
        return self.gist is None or not self.grow or sequence.placement.certain

    def _suffix_feed(self, sequence: LiveSequence, tokens: Sequence[int]) -> Feed:
        if self.gist is None:
            return raw_feed(tokens, False)
        enter = sequence.placement.push if self.grow else sequence.placement.leave
        return enter(tokens, self.rule is not None)

    @torch.no_grad()
    def _prefill(self, sequence: LiveSequence, feed: Feed) -> None:
        """Read a feed in runs of PREFILL tokens."""
        places = sequence.take(feed)
        for start in range(places.start, places.stop, PREFILL):
            run = slice(start, min(start + PREFILL, places.stop))
            sight = sequence.cache.outline.append(sequence.level[run], sequence.recalls[run])
            attend = PrefillAttention(sequence.cache, sight, self.rule, self.first, self.device)
            hidden = self._run(sequence.ids[run], sight.position, attend)
            raw = sight.members[-1]
            if len(raw):
                sequence.logits = self.model.head_logits(hidden[raw[-1]])

    def _run(self, ids: list[int], position: Tensor, attend) -> Tensor:
        """ids [n], rotary position [n] -> [n, hidden] after the final norm."""
        return self.model.run_layers(torch.tensor([ids], device=self.device), position[None].to(self.device), attend)[:, 0]

    def _begin(self, sequence: LiveSequence, tokens: Sequence[int]) -> None:
        """Check what is to be read, and read what was chosen before it."""
        self._check_tokens(tokens)
        if sequence.pending:
            self.step([sequence])

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"tokens: id {token} is outside the vocabulary of {self.vocabulary} pieces")
