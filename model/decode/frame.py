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

from unfold.kernels.decode import Step
from unfold.kernels.select import SelectRule
from unfold.model.decode.replay import Replays
from unfold.model.decode.sampling import BLOCK, Sampling, choose
from unfold.model.decode.step import NewTokens, step_of
from unfold.model.gist.growing import recalls_in
from unfold.model.transformer import Transformer

AHEAD = 128  # raw tokens for which a state's sizes, and the caches' memory, suffice


class State:
    """What a step reads, views of one memory, so that one copy fills them all.

    Attributes (int64 unless said otherwise; T slots, S sequences, L levels):
        ids, position, span: [T], token, rotary position, interleaved tokens up to and including it.
        items: [T, 2], segment and row of the token's key and value.
        moves: [T], 1 where the slot goes on with the next raw token, 0 where it pads the frame.
        recalls: [T], 1 where it unfolds chunks.
        last: [S], the slot after which each sequence's next token is chosen.
        draw: [1], the round: which of the drawn numbers tokens are chosen with.
        places: [layers, T, 2 * (L + 1) + L], see kernels/decode/kernels.py.
        ints: int32 [2, T, 3 + 5 * L], see there: where nothing recalls, and where the tokens recall that do.
    """

    def __init__(self, slots: int, sequences: int, layers: int, levels: int, device: torch.device | str, pinned: bool = False):
        shapes = {name: (slots,) for name in ("ids", "position", "span", "moves", "recalls")}
        shapes |= {"items": (slots, 2), "last": (sequences,), "draw": (1,), "places": (layers, slots, 3 * levels + 2)}
        whole = sum(math.prod(shape) for shape in shapes.values()) + slots * (3 + 5 * levels)
        self.memory = torch.zeros(whole, dtype=torch.int64, device=device, pin_memory=pinned)
        at = 0
        for name, shape in shapes.items():
            setattr(self, name, self.memory[at : at + math.prod(shape)].view(shape))
            at += math.prod(shape)
        self.ints = self.memory[at:].view(torch.int32).view(2, slots, 3 + 5 * levels)


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
        sizes = slots, sequences, config.layers, levels
        self.state = State(*sizes, self.device)
        self.logits = weight.new_empty(sequences, config.vocab_size)
        self.chosen = torch.zeros(sequences, dtype=torch.int64, device=self.device)
        self.draws = torch.zeros(sequences, BLOCK, dtype=torch.float64, device=self.device)
        # Rows of slots that pad the frame; and what all places count from.
        self.anchor = weight.new_zeros(2, config.kv_heads, slots, config.head_dim)
        self.ends = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.resting = State(*sizes, "cpu", pinned=self.device.type == "cuda")
        self._rest(self.resting)
        self.left, self.fills, self.tables, self.sampling, self.replay = 0, 0, (), None, None

    def _rest(self, state: State) -> None:
        """Every slot pads the frame."""
        own = torch.arange(self.slots)
        state.span[:], state.items[:, 0], state.items[:, 1] = 1, self.levels, own
        state.places[..., 1 : 2 * (self.levels + 1) : 2] = self.slots
        state.ints[:, :, 1], state.ints[:, :, 2] = own, own + 1

    def fill(self, new: Sequence[tuple[int, NewTokens, list[int]]], sampling: Sampling | None, draw: int = 0) -> None:
        """Put new tokens of some sequences into the state: their outlines and caches have room for them already.

        Args:
            new: of each sequence that reads: its number, its tokens, their ids. The others' logits mean nothing afterwards.
            sampling: how next tokens are chosen; None: they are not.
            draw: the round: which of ``draws`` they are chosen with.
        """
        state = State(self.slots, self.sequences, self.state.places.shape[0], self.levels, "cpu", self.device.type == "cuda")
        state.memory.copy_(self.resting.memory)
        count = [len(ids) for _, _, ids in new]
        alone = self.slots == self.sequences
        assert sum(count) <= self.slots and not (alone and max(count) > 1)
        at = [n for n, _, _ in new] if alone else [i for i in range(sum(count))]
        step = step_of([tokens.cache for _, tokens, _ in new], [tokens.sight for _, tokens, _ in new])
        state.ids[at] = torch.tensor([i for _, _, ids in new for i in ids])
        for name in ("position", "segment", "number", "recalls"):
            values = torch.cat([getattr(tokens.sight, name) for _, tokens, _ in new]).long()
            view = {"segment": state.items[:, 0], "number": state.items[:, 1]}.get(name)
            (getattr(state, name) if view is None else view)[at] = values
        state.span[at], state.moves[at], state.draw[0] = step.span, 1, draw
        last = torch.tensor(count).cumsum(0) - torch.tensor([len(ids) - tokens.last_raw for _, tokens, ids in new])
        state.last[[n for n, _, _ in new]] = torch.tensor(at)[last]
        tables = self._tables(step)
        for ints, table in zip(state.ints, tables):
            ints[at] = table.ints
        state.places[:, at] = self._places([tokens for _, tokens, _ in new])
        self.tables = tuple(replace(table, ints=ints, ends=self.ends) for table, ints in zip(tables, self.state.ints))
        buckets = tuple((t.candidates, t.widths, t.room, t.rows, t.recalls) for t in tables)
        key = self.slots, self.sequences, buckets, sampling and replace(sampling, max_new_tokens=0, seed=0)
        self.sampling, self.left = sampling, AHEAD if alone else 0
        self.fills += 1
        self.replay = self.replays.prepare(key, self)
        self.state.memory.copy_(state.memory, non_blocking=True)

    def _tables(self, step: Step) -> list:
        from unfold.kernels.decode.triton import tables_of

        steps = [step.forgetting(), step] if self.rule is not None else [step]
        tables = [tables_of(s, self.rule, self.group, self.device, AHEAD) for s in steps]
        return [tables[0], tables[-1]]

    def _places(self, batch: Sequence[NewTokens]) -> Tensor:
        """[layers, tokens, ..]"""
        from unfold.kernels.decode.triton import places_of, why_not_rows

        if reason := why_not_rows([new.cache.layers[0] for new in batch]):
            raise ValueError(reason)
        lines = []
        for index in range(len(self.model.layers)):
            own = [places_of(self.anchor, new.cache.layers[index], self.ends, new.cache.outline) for new in batch]
            lines.append([line for line, new in zip(own, batch) for _ in new.sight.recalls])
        return torch.tensor(lines)

    def run(self) -> None:
        """One step; on a GPU nothing waits for it."""
        self.replay()
        self.left -= 1

    def rest(self) -> None:
        """As every method up to :meth:`step`: see :class:`unfold.model.decode.replay.Replayable`."""
        self.state.memory.copy_(self.resting.memory)

    def kept(self) -> list[Tensor]:
        return [self.state.memory, self.logits, self.chosen]

    def spoil(self) -> None:
        from unfold.kernels.decode.triton import keep

        _, kv_heads, slots, dim = self.anchor.shape
        rows = self.anchor.new_full((slots, kv_heads, dim), torch.nan)
        for places in self.state.places:
            keep(rows, rows, self.anchor, places, self.state.items)
        self.logits.fill_(torch.nan)
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
        state, recalls = self.state, self.state.recalls[:, None]
        state.ids.copy_(self.chosen)
        state.draw.add_(1)
        for counted in (state.position, state.items[:, 1], state.span, state.ints[0, :, 2], state.ints[1, :, 2]):
            counted.add_(state.moves)
        if self.rule is not None:
            upto = state.ints[1, :, 5::5].long()
            taken = self.rule.budget(state.span[:, None], upto, self.group).minimum(upto) * recalls
            state.ints[1, :, 7::5].copy_(taken)

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, T, H, D], k, v [1, T, Hkv, D] -> [1, T, H, D]"""
        from unfold.kernels.decode import triton as kernels

        places = self.state.places[index]
        kernels.keep(k[0], v[0], self.anchor, places, self.state.items)
        table, scale = self.tables[recalls_in(index, self.first)], 1 / math.sqrt(q.shape[3])
        return kernels.run(q[0].contiguous(), table, places, scale, k.shape[2], self.rule, self.anchor)[None]
