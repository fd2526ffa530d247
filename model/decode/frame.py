"""A decoding step as a function of tensors at fixed addresses, of fixed shapes: what a CUDA graph can replay.

A :class:`Frame` has *slots*, each of which reads one token. What differs from step to step stands in its state on the device:
tokens, positions, what every slot sees, where rows lie, which item it becomes. The host fills the state, one copy, when the
sequences of a batch got gists, moved or changed; and while every sequence goes on by one raw token after another, the step itself
leaves behind the state of the next one (:meth:`Frame.advance`), its own choice of tokens included. Sizes that bound loops and
scratch are buckets, held for AHEAD tokens; with them a step's graph is captured once.

Slots that have nothing to read pad the frame: each reads and writes a row of a memory of no sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unfold.kernels.select import SelectRule
from unfold.model.decode.replay import Replays
from unfold.model.decode.sampling import BLOCK, Sampling, choose
from unfold.model.decode.step import NewTokens, step_of
from unfold.model.gist.growing import Sight, recalls_in
from unfold.model.kinds import kind_of, window_of
from unfold.model.transformer import Transformer

AHEAD = 128  # raw tokens for which a state's sizes, and the caches' memory, suffice


class State:
    """What a step reads, views of one memory, so that one copy fills them all.

    Args:
        slots, sequences, levels: T, S, L.
        kinds: of the layers, in order.
        variants: tables: what tokens see in layers of which kind, and whether they recall; those with a window come last.

    Attributes (int64 unless said otherwise; K kinds, V variants, W of them with a window):
        ids, position, span: [T], token, rotary position, interleaved tokens up to and including it.
        items: [K, T, 2], segment and row of the token's key and value in layers of each kind.
        moves: [T], 1 where the slot goes on with the next raw token, 0 where it pads the frame.
        recalls: [T], 1 where it unfolds chunks.
        last: [S], the slot after which each sequence's next token is chosen.
        draw: [1], the round: which of the drawn numbers tokens are chosen with.
        sink: [T], how many of the first raw tokens layers with a window see.
        at: [1], steps since the state was filled.
        begins: [W, T, AHEAD + 1], the first row of the window in this step and in the ones after it.
        places: [layers, T, 2 * (L + 1) + L], see kernels/decode/kernels.py.
        ints: int32 [V, T, 3 + 5 * L], see there.
    """

    def __init__(
        self,
        slots: int,
        sequences: int,
        levels: int,
        kinds: Sequence[str],
        variants: Sequence[tuple[str, bool]],
        device: torch.device | str,
        pinned: bool = False,
    ):
        windows = sum(window_of(kind) is not None for kind, _ in variants)
        shapes = {name: (slots,) for name in ("ids", "position", "span", "moves", "recalls", "sink")}
        shapes |= {"items": (len(set(kinds)), slots, 2), "last": (sequences,), "draw": (1,), "at": (1,)}
        shapes |= {"begins": (windows, slots, AHEAD + 1), "places": (len(kinds), slots, 3 * levels + 2)}
        ints = len(variants), slots, 3 + 5 * levels
        whole = sum(math.prod(shape) for shape in shapes.values()) + (math.prod(ints) + 1) // 2
        self.memory = torch.zeros(whole, dtype=torch.int64, device=device, pin_memory=pinned)
        at = 0
        for name, shape in shapes.items():
            setattr(self, name, self.memory[at : at + math.prod(shape)].view(shape))
            at += math.prod(shape)
        self.ints = self.memory[at:].view(torch.int32)[: math.prod(ints)].view(ints)


class Frame:
    """The step of so many slots for so many sequences of one model; an :data:`unfold.model.visibility.Attend` of one row.

    Args:
        model: whose layers read.
        levels: of gists; 0 for a dense model.
        rule: how gists are selected; None where nothing recalls.
        first: the first layer that recalls.
        never: ids that are not chosen, [n] int64 on the model's device.
        slots, sequences: sizes. Where they are equal, slot n is of sequence n, and a step may follow another without the host.
        replays: runs the step.

    Attributes:
        logits: [S, vocab] after each sequence's last token.
        chosen: [S] int64, the tokens chosen from them.
        draws: fp64 [S, BLOCK], the numbers drawn.
        left: steps that may follow before the state must be filled again.
        fills: how often it was filled.
    """

    def __init__(
        self,
        model: Transformer,
        levels: int,
        rule: SelectRule | None,
        first: int,
        never: Tensor,
        slots: int,
        sequences: int,
        replays: Replays,
    ):
        config, weight = model.config, model.head_weight
        self.model, self.levels, self.rule, self.first, self.never = model, levels, rule, first, never
        self.slots, self.sequences, self.replays = slots, sequences, replays
        self.group, self.device = config.heads // config.kv_heads, weight.device
        kinds = config.kinds_with(levels > 0)
        self.kinds = [kind_of(kinds, index) for index in range(config.layers)]
        own = sorted(set(self.kinds), key=lambda kind: (window_of(kind) is not None, kind))
        self.kind_index = {kind: number for number, kind in enumerate(own)}
        self.variants = [(kind, recalls) for kind in own for recalls in (False, True) if not recalls or rule and kind == "gist"]
        self.windows = [kind for kind in own if window_of(kind) is not None]
        self.recalling = self.variants.index(("gist", True)) if ("gist", True) in self.variants else None
        self.sizes = slots, sequences, levels, self.kinds, self.variants
        self.state = State(*self.sizes, self.device)
        self.logits = weight.new_empty(sequences, config.vocab_size)
        self.chosen = torch.zeros(sequences, dtype=torch.int64, device=self.device)
        self.draws = torch.zeros(sequences, BLOCK, dtype=torch.float64, device=self.device)
        # Rows of slots that pad the frame; and what all places count from.
        self.anchor = weight.new_zeros(2, config.kv_heads, slots, config.head_dim)
        self.ends = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.resting = State(*self.sizes, "cpu", pinned=self.device.type == "cuda")
        self._rest(self.resting)
        self.left, self.fills, self.tables, self.sampling, self.replay = 0, 0, (), None, None

    def _rest(self, state: State) -> None:
        """Every slot pads the frame."""
        own = torch.arange(self.slots)
        state.span[:], state.items[..., 0], state.items[..., 1], state.begins[:] = 1, self.levels, own, own[:, None]
        state.places[..., 1 : 2 * (self.levels + 1) : 2] = self.slots
        state.ints[:, :, 1], state.ints[:, :, 2] = own, own + 1

    def fill(self, new: Sequence[tuple[int, NewTokens, list[int]]], sampling: Sampling | None, draw: int = 0) -> None:
        """Put new tokens of some sequences into the state, and make room for them in the caches.

        Args:
            new: of each sequence that reads: its number, its tokens, their ids. The others' logits mean nothing afterwards.
            sampling: how next tokens are chosen; None: they are not.
            draw: the round: which of ``draws`` they are chosen with.
        """
        state = State(*self.sizes, "cpu", self.device.type == "cuda")
        state.memory.copy_(self.resting.memory)
        count = [len(ids) for _, _, ids in new]
        alone = self.slots == self.sequences
        assert sum(count) <= self.slots and not (alone and max(count) > 1)
        at = [n for n, _, _ in new] if alone else list(range(sum(count)))
        batch = [tokens for _, tokens, _ in new]
        views = [tokens.cache.views(tokens.sight) for tokens in batch]
        for tokens in batch:
            tokens.cache.settle(AHEAD)
        state.ids[at] = torch.tensor([i for _, _, ids in new for i in ids])
        for name in ("position", "span", "recalls"):
            getattr(state, name)[at] = torch.cat([getattr(tokens.sight, name) for tokens in batch]).long()
        for kind, number in self.kind_index.items():
            state.items[number, at] = torch.cat([torch.stack([v[kind].segment, v[kind].number], 1) for v in views])
        state.sink[at] = torch.tensor([tokens.sight.sink for tokens in batch]).repeat_interleave(torch.tensor(count))
        state.moves[at], state.draw[0] = 1, draw
        last = torch.tensor(count).cumsum(0) - torch.tensor([len(ids) - tokens.last_raw for _, tokens, ids in new])
        state.last[[n for n, _, _ in new]] = torch.tensor(at)[last]
        if alone:
            for begins, kind in zip(state.begins, self.windows):
                begins[at] = torch.stack([t.cache.begins(kind, t.sight.position + torch.arange(AHEAD + 1)) for t in batch])
        tables = self._tables(batch, views)
        for ints, table in zip(state.ints, tables):
            ints[at] = table.ints
        state.places[:, at] = self._places(batch)
        self.tables = tuple(replace(table, ints=ints, ends=self.ends) for table, ints in zip(tables, self.state.ints))
        buckets = tuple((t.candidates, t.widths, t.room, t.rows, t.recalls) for t in tables)
        key = self.slots, self.sequences, buckets, sampling and replace(sampling, max_new_tokens=0, seed=0)
        self.sampling, self.left = sampling, AHEAD if alone else 0
        self.fills += 1
        self.replay = self.replays.prepare(key, self)
        self.state.memory.copy_(state.memory, non_blocking=True)

    def _tables(self, batch: Sequence[NewTokens], views: Sequence[dict[str, Sight]]) -> list:
        """One for each variant."""
        from unfold.kernels.decode.triton import tables_of

        caches = [tokens.cache for tokens in batch]
        steps = {kind: step_of(caches, [view[kind] for view in views]) for kind in self.kind_index}
        steps = [steps[kind] if recalls else steps[kind].forgetting() for kind, recalls in self.variants]
        return [tables_of(step, self.rule, self.group, self.device, AHEAD) for step in steps]

    def _places(self, batch: Sequence[NewTokens]) -> Tensor:
        """[layers, tokens, ..]"""
        from unfold.kernels.decode.triton import places_of, why_not_rows

        addresses = torch.stack([new.cache.addresses() for new in batch], 1)
        if reason := why_not_rows(int(addresses[..., 1].max())):
            raise ValueError(reason)
        places = places_of(self.anchor, self.ends, addresses, [new.cache.outline for new in batch])
        return places.repeat_interleave(torch.tensor([len(new.sight.recalls) for new in batch]), 1)

    def run(self) -> None:
        """One step; on a GPU nothing waits for it."""
        self.replay()
        self.left -= 1

    def rest(self) -> None:
        """As every method up to :meth:`step`: see :class:`unfold.model.decode.replay.Replayable`."""
        self.state.memory.copy_(self.resting.memory)

    def kept(self) -> list[Tensor]:
        chosen = [] if self.sampling is None else [self.chosen]  # which a step that chooses nothing leaves as it is
        return [self.state.memory, self.logits, *chosen]

    def spoil(self) -> None:
        from unfold.kernels.decode.triton import keep

        _, kv_heads, slots, dim = self.anchor.shape
        rows = self.anchor.new_full((slots, kv_heads, dim), torch.nan)
        for places, kind in zip(self.state.places, self.kinds):
            keep(rows, rows, self.anchor, places, self.state.items[self.kind_index[kind]])
        self.logits.fill_(torch.nan)
        if self.sampling is not None:
            self.chosen.fill_(-1)

    @torch.no_grad()
    def step(self) -> None:
        state = self.state
        hidden = self.model.run_layers(state.ids[None], state.position[None], self)[:, 0]
        self.logits.copy_(self.model.head_logits(hidden.index_select(0, state.last)))
        if self.sampling is None:
            return
        draw = self.draws.index_select(1, state.draw % BLOCK)[:, 0]
        self.chosen.copy_(choose(self.logits, self.never, self.sampling, draw))
        if self.slots == self.sequences:
            self.advance()

    def advance(self) -> None:
        """The state of the next step, in which every sequence reads the token chosen here."""
        state = self.state
        state.ids.copy_(self.chosen)
        state.draw.add_(1)
        for counted in (state.position, state.span, state.items[..., 1], state.ints[..., 2]):
            counted.add_(state.moves)
        if self.windows:
            state.at.add_(1)
            begin, own = state.begins.index_select(2, state.at)[..., 0], state.ints[-len(self.windows) :]
            own[..., 1].copy_(begin)
            own[..., 0].copy_(begin.minimum(state.sink))  # what was forgotten lies behind the sinks
        if self.recalling is not None:
            own = state.ints[self.recalling]
            upto = own[:, 5::5].long()
            taken = self.rule.budget(state.span[:, None], upto, self.group).minimum(upto) * state.recalls[:, None]
            own[:, 7::5].copy_(taken)

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, T, H, D], k, v [1, T, Hkv, D] -> [1, T, H, D]"""
        from unfold.kernels.decode import triton as kernels

        places, kind = self.state.places[index], self.kinds[index]
        kernels.keep(k[0], v[0], self.anchor, places, self.state.items[self.kind_index[kind]])
        recalls = self.recalling is not None and recalls_in(index, self.first, kind)
        table, scale = self.tables[self.variants.index((kind, recalls))], 1 / math.sqrt(q.shape[3])
        return kernels.run(q[0].contiguous(), table, places, scale, k.shape[2], self.rule, self.anchor)[None]
