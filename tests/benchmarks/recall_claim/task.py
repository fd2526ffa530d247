"""Look-ups in a context: facts strewn into filler, then questions about some of them, one or two hops away.

A *fact* is one token that stands for (key, value), a *link* one that stands for (alias, key). Who reads `key` after the context
answers its value: one hop. Who reads `alias` answers the key that the context links it to, and then, with that key written, its
value: two hops, right only if both are. Facts that nobody asks for, and filler, distract.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from unfold.model.gist import GistConfig, Recall, build_layout, interleave
from unfold.model.gist.recall import RECALLS, ROUTES, UNFOLDS_ALL
from unfold.model.visibility import IGNORED, MicroBatch


@dataclass(frozen=True)
class LookupTask:
    """Sizes of the task; ids are laid out as [facts | links | keys | aliases | values | filler | gists].

    Attributes:
        context: raw tokens before the questions.
        facts, links: how many of them a context holds; every link leads to another fact.
        singles: facts that are asked for directly; the rest are asked through links or by nobody.
    """

    context: int = 256
    facts: int = 24
    links: int = 8
    singles: int = 14
    keys: int = 32
    values: int = 16
    aliases: int = 16
    filler: int = 16

    def __post_init__(self):
        if self.facts + self.links > self.context:
            raise ValueError(f"context: {self.context} tokens do not hold {self.facts} facts and {self.links} links")
        if self.facts > self.keys or self.links > self.aliases or self.singles + self.links > self.facts:
            raise ValueError(
                f"facts: {self.facts} must be at most keys ({self.keys}) and at least singles + links "
                f"({self.singles} + {self.links}); links at most aliases ({self.aliases})"
            )

    @property
    def link_ids(self) -> int:
        """Id of the first link."""
        return self.keys * self.values

    @property
    def key_ids(self) -> int:
        return self.link_ids + self.aliases * self.keys

    @property
    def alias_ids(self) -> int:
        return self.key_ids + self.keys

    @property
    def value_ids(self) -> int:
        return self.alias_ids + self.aliases

    @property
    def filler_ids(self) -> int:
        return self.value_ids + self.values

    @property
    def gist_ids(self) -> int:
        """Id of the level-0 gist; higher levels follow."""
        return self.filler_ids + self.filler

    @property
    def vocab_size(self) -> int:
        return self.gist_ids + 4

    @property
    def questions(self) -> int:
        """Raw tokens after the context."""
        return self.singles + 2 * self.links

    def scaled(self, context: int) -> LookupTask:
        """The same task in a context of another length: a shorter one has as many facts to the token, a longer one no more."""
        part = lambda n: max(1, n * min(context, self.context) // self.context)
        return LookupTask(context, part(self.facts), part(self.links), part(self.singles), *self._vocabulary)

    @property
    def _vocabulary(self) -> tuple[int, int, int, int]:
        return self.keys, self.values, self.aliases, self.filler

    def sample(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One context [context], its questions [questions] and their labels [questions], all int64."""
        key, alias = draw.permutation(self.keys)[: self.facts], draw.permutation(self.aliases)[: self.links]
        value = draw.integers(0, self.values, self.facts)
        context = self.filler_ids + draw.integers(0, self.filler, self.context)
        place = draw.permutation(self.context)[: self.facts + self.links]
        context[place[: self.facts]] = key * self.values + value
        context[place[self.facts :]] = self.link_ids + alias * self.keys + key[: self.links]  # keys are in random order
        asked = slice(self.links, self.links + self.singles)
        one = [((self.key_ids + k,), (self.value_ids + v,)) for k, v in zip(key[asked], value[asked])]
        two = [
            ((self.alias_ids + a, self.key_ids + k), (self.key_ids + k, self.value_ids + v)) for a, k, v in zip(alias, key, value)
        ]
        units = [*one, *two]
        order = draw.permutation(len(units))
        asked_ids = np.concatenate([units[i][0] for i in order])
        return context, asked_ids, np.concatenate([units[i][1] for i in order])

    def batch(self, draw: np.random.Generator, size: int, gist: GistConfig | None) -> MicroBatch:
        """``size`` samples, each one document: the context closed with gists (none for ``gist`` None), then the questions.

        With ``gist.recall`` 'suffix' the questions recall; all of them are taken for the routing loss, if there is one.
        """
        rows = []
        for _ in range(size):
            context, asked, answers = self.sample(draw)
            level = np.full(len(context), -1, np.int32)
            if gist is not None:
                gists = range(self.gist_ids, self.gist_ids + gist.levels)
                made = interleave(context, [len(context)], np.ones(self.vocab_size, bool), gist, gists, close=True)
                context, level = made.ids, made.level
            ids, levels = np.append(context, asked), np.append(level, np.full(len(asked), -1, np.int32))
            rows.append((ids, levels, np.append(np.full(len(context), IGNORED), answers)))
        ids, level, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
        layout = build_layout(level, torch.zeros_like(level), gist or GistConfig((self.context,)))
        if gist is None or gist.recall == "none":
            return MicroBatch(ids, labels, layout)
        flags = torch.zeros_like(level)
        flags[:, -self.questions :] = RECALLS | UNFOLDS_ALL * gist.unfold_all | ROUTES * (gist.route_loss > 0)
        return MicroBatch(ids, labels, layout, Recall.from_flags(layout, gist, flags))

    def score(self, batch: MicroBatch, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which questions were answered rightly: bool [one-hop questions], bool [two-hop questions].

        answers: [B, T] int64, the predicted ids. The written key of a two-hop question is the right one, as it is when the
        model writes it itself and is right; where it would not be, the question counts as wrong.
        """
        right, ids = answers == batch.labels, batch.ids
        alias = (ids >= self.alias_ids) & (ids < self.value_ids)
        after = torch.zeros_like(alias)
        after[:, 1:] = alias[:, :-1]
        single = (ids >= self.key_ids) & (ids < self.alias_ids) & ~after
        return right[single], right[alias] & right[after]
