"""Gist attention for exported models: the stock classes of ``transformers``, with gists hidden inside ``forward``.

Loaded by ``AutoModelForCausalLM.from_pretrained(.., trust_remote_code=True, attn_implementation="gist")``. Raw tokens go in,
logits of raw tokens come out: gists are put among them on the way to the layers and taken off before the output head.
With any other ``attn_implementation`` the classes are the stock ones. Works with transformers 4.57 and later.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface

# transformers 4.57 copies the files that this one imports, and not those that they import.
from unfold.model.gist.growable import Growable  # noqa: F401
from unfold.model.gist.growing import Sight
from unfold.model.gist.joining import JoinedOutline
from unfold.model.gist.parts import Identity, Part
from unfold.model.kinds import kind_of  # noqa: F401

from .documents import identity_of, join, part_of
from .gist_attention import GistPass
from .gist_sequence import GistSequence, GistSettings
from .own_kernels import find_kernels

GIST = "gist"
PREFIX = "Gist"  # of the names of the classes here, before those of the stock ones
IGNORED = -100
# What this version of transformers calls the cache in ``forward`` and in its results: it was renamed in 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


class GistCache(Cache):
    """What a batch of sequences has computed so far. Its length is that of the raw input, padding included.

    Keys and values are kept per sequence, layer and segment (every gist level, raw tokens), in memory that doubles.
    """

    def __init__(self, sequences: Sequence[GistSequence]):
        super().__init__(layers=[])
        self.sequences, self.length = list(sequences), 0
        self.input_ids: Tensor | None = None  # of joined parts, [1, length]: what goes before a question in generate()

    def get_seq_length(self, *args, **kwargs) -> int:
        return self.length

    def get_mask_sizes(self, query, *args, **kwargs) -> tuple[int, int]:
        return self.length + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_cache_shape(self, *args, **kwargs) -> int:
        return -1

    get_max_length = get_max_cache_shape
    # Said here, because the base class says what holds of all of its layers, and this one has none.
    is_croppable = is_compileable = False
    is_linear = is_sliding = is_dummy = (False,)

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i goes on as ``beam_idx[i]`` did; only what goes on more than once is copied."""
        taken, chosen = set(), []
        for i in beam_idx.tolist():
            chosen.append(self.sequences[i].copy() if i in taken else self.sequences[i])
            taken.add(i)
        # Copies are made before any of the originals goes on.
        self.sequences = chosen

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.sequences)).repeat_interleave(repeats))

    @property
    def joined(self) -> bool:
        """Whether parts were joined here."""
        return any(isinstance(sequence.outline, JoinedOutline) for sequence in self.sequences)

    def reset(self) -> None:
        if self.joined:
            raise ValueError("a cache of joined parts cannot be emptied; join them anew")
        self.sequences = [GistSequence(s.settings, s.device) for s in self.sequences]
        self.length = 0

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError("a gist cache cannot be cropped: assisted generation and prompt lookup do not work with gists")


def gist_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, gist_pass=None, **kwargs
):
    """An attention function of transformers. query [1, H, N, D], key, value [1, Hkv, N, D] -> [1, N, H, D], no weights."""
    if gist_pass is None:
        raise ValueError(
            'attn_implementation="gist": this class does not put gists in; load the export with AutoModelForCausalLM and '
            "trust_remote_code=True, and call the whole model rather than its layers"
        )
    if sliding_window is not None:
        raise ValueError(f"sliding_window: {sliding_window}; gist attention has no sliding window, set it to null in config.json")
    if dropout:
        raise ValueError(f"attention_dropout: {dropout}; gist attention has none, set it to 0 in config.json")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = gist_pass.attend(module.layer_idx, query[0], key[0], value[0], scale)
    return out.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(GIST, gist_attention_forward)


class GistForCausalLM:
    """What turns a stock ``..ForCausalLM`` into one with gists; to be inherited from before it."""

    _can_compile_fullgraph = False  # what is computed depends on the tokens
    gist_kernels = find_kernels()  # set to None on a model, it does everything in plain PyTorch

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        gist_query_start: int | Tensor | None = None,
        gist_grow: bool | None = None,
        gist_chunk_sizes: Sequence[int] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ):
        """The stock forward pass, with gists.

        Args:
            input_ids: [B, n] raw tokens that follow those in the cache.
            attention_mask: [B, n] or [B, cached + n], 0 at padding, on either side; gists never see it.
            position_ids: positions are those of the raw tokens without padding. Where these begin again from 0 in a row of a
                first call, a document of its own begins, as in packed training data; nothing can be read after such rows.
            past_key_values, cache: what a former call returned, under either name; its sequences go on.
            labels: [B, n]; the loss is that of training: next raw token at raw tokens, none for padding.
            logits_to_keep: as in the stock classes.
            gist_query_start: how many raw tokens of each sequence, from its start and without padding, are context: they
                are folded into gists and closed, what follows them (a question, its answer) recalls. One number or [B].
                Without it a prompt is folded as it is, and what is read after it recalls.
            gist_grow: whether what follows a closed context gets gists as its chunks close. By default it does not.
            gist_chunk_sizes: for new sequences, in place of those of ``config.gist``; a cache goes on with its own.
        """
        if past_key_values is not None and cache is not None:
            raise ValueError("past_key_values, cache: are two names of the same thing; give one of them")
        before = past_key_values if cache is None else cache
        if self.config._attn_implementation != GIST:
            if any(x is not None for x in (gist_query_start, gist_grow, gist_chunk_sizes)):
                raise ValueError('gist_query_start, gist_grow, gist_chunk_sizes: need attn_implementation="gist"')
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **{CACHE: before},
                **kwargs,
            )
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("inputs_embeds: gists are placed by token ids; give input_ids alone")
        if kwargs.pop("output_attentions", None) or getattr(self.config, "output_attentions", False):
            raise ValueError("output_attentions: gist attention keeps no weights; load with attn_implementation='eager' for them")
        real = _real_tokens(input_ids, attention_mask)
        cache = self._gist_cache(before, input_ids, gist_chunk_sizes)
        first = _first_tokens(real, None if cache.length else position_ids)
        packed = bool((first.sum(1) > 1).any())
        if packed and gist_query_start is not None:
            raise ValueError("gist_query_start: position_ids say that rows hold several documents; give one document a row")
        parts, ids, columns = self._read(cache, input_ids, real, first, gist_query_start, gist_grow)
        return_dict = kwargs.pop("return_dict", None)
        num_items = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in ("cache_position", "past_key_value")}
        use_cache = not packed and (self.config.use_cache if use_cache is None else use_cache)
        outputs = self.model(
            input_ids=torch.tensor([ids], device=input_ids.device),
            position_ids=torch.cat([sight.position for _, sight in parts])[None],
            use_cache=False,
            gist_pass=GistPass(parts, self.gist_kernels, keep=use_cache),
            **kwargs,
        )
        raw = lambda x: _spread(x[0], columns, real)
        hidden = raw(outputs.last_hidden_state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            labels = labels.masked_fill((~real | first).to(labels.device), IGNORED)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **num_items)
        states = getattr(outputs, "hidden_states", None)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=None if states is None else tuple(raw(x) for x in states),
            **{CACHE: cache if use_cache else None},
        )
        return result.to_tuple() if return_dict is False else result

    def gist_identity(self) -> Identity:
        """Fingerprints of the weights and of how gists are put in; only parts that were read with the same can be joined."""
        state = [(p.data_ptr(), p._version) for p in self.parameters()]
        if getattr(self, "_identity", (None,))[0] != state:
            self._identity = state, identity_of(self)
        return self._identity[1]

    @torch.no_grad()
    def read_part(self, input_ids: Tensor | Sequence[int]) -> Part:
        """Read a document of raw tokens, [n] or [1, n], by itself, to be joined with others by :meth:`join_parts`."""
        tokens = torch.as_tensor(input_ids).flatten().tolist()
        if not tokens:
            raise ValueError("input_ids: a part has no token; leave it out")
        ids = torch.tensor([tokens], device=self.device)
        out = self(ids, gist_query_start=len(tokens), use_cache=True, logits_to_keep=1)
        return part_of(self.gist_identity(), tokens, out[CACHE].sequences[0])

    def join_parts(self, parts: Sequence[Part], prefix_ids: Tensor | Sequence[int] = ()) -> GistCache:
        """A cache of a prefix, parts in any order, and their links: the ``past_key_values`` of a question on them.

        generate() wants all ids: ``generate(torch.cat([cache.input_ids, question], 1), past_key_values=cache)``. For several
        questions take copies of the cache: ``copy.deepcopy(cache)``.
        """
        if self.config._attn_implementation != GIST:
            raise ValueError('parts: need attn_implementation="gist"')
        sequence, ids = join(self, parts, torch.as_tensor(prefix_ids).flatten().long().tolist())
        cache = GistCache([sequence])
        cache.length, cache.input_ids = len(ids), torch.tensor([ids], device=self.device)
        return cache

    def _gist_cache(self, cache: Cache | None, input_ids: Tensor, chunk_sizes: Sequence[int] | None) -> GistCache:
        """The cache to go on with; an empty stock cache, such as generate() makes, stands for a new one."""
        if isinstance(chunk_sizes, (int, str)):
            raise ValueError(f"gist_chunk_sizes: {chunk_sizes!r}; expected a list of one size per level, such as [8, 4]")
        if isinstance(cache, GistCache) and cache.sequences:
            if len(cache.sequences) != len(input_ids):
                raise ValueError(f"{CACHE}: holds {len(cache.sequences)} sequences, input_ids {len(input_ids)}")
            own = cache.sequences[0].settings.chunk_sizes
            if chunk_sizes is not None and tuple(chunk_sizes) != own:
                raise ValueError(f"gist_chunk_sizes: {list(chunk_sizes)}, but {CACHE} was read with {list(own)}; begin a new one")
            return cache
        if cache is not None and (not isinstance(cache, (GistCache, DynamicCache)) or cache.get_seq_length()):
            raise ValueError(
                f"{CACHE}: a {type(cache).__name__}; gists need the cache of their own that forward and generate return"
            )
        settings = GistSettings.of(self.config, chunk_sizes)
        return GistCache([GistSequence(settings, input_ids.device) for _ in input_ids])

    def _read(
        self, cache: GistCache, input_ids: Tensor, real: Tensor, first: Tensor, query_start, grow: bool | None
    ) -> tuple[list[tuple[GistSequence, Sight]], list[int], Tensor]:
        """Enter the new raw tokens into the sequences of the cache; documents after the first of a row get their own.

        Returns:
            (sequence, sight) of all that read something; the interleaved ids of all of them, side by side; where in these
            the new raw tokens are, sequence by sequence, [tokens] int64.
        """
        starts = [None]
        if query_start is not None:
            starts = [query_start] if isinstance(query_start, str) else torch.as_tensor(query_start).flatten().tolist()
            if len(starts) not in (1, len(input_ids)) or not all(isinstance(n, int) and n >= 0 for n in starts):
                raise ValueError(
                    f"gist_query_start: {starts} for {len(input_ids)} sequences; give one whole number or one each, not below 0"
                )
        parts, ids, columns = [], [], []
        for i, sequence in enumerate(cache.sequences):
            row = input_ids[i][real[i]]
            borders = first[i][real[i]].nonzero()[1:, 0].tolist()
            for number, document in enumerate(row.tensor_split(borders)):
                tokens = document.tolist()
                if tokens and not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
                    raise ValueError(f"input_ids: row {i} has an id outside the vocabulary of {self.config.vocab_size}")
                if number:
                    sequence = GistSequence(sequence.settings, sequence.device)
                feed = sequence.read(tokens, starts[i if len(starts) > 1 else 0], grow)
                if not feed.ids:
                    continue
                parts.append((sequence, sequence.append(feed)))
                # Tokens that are read again stand before the new ones, which are the last raw ones.
                places = [len(ids) + place for place, level in enumerate(feed.level) if level < 0]
                columns += places[len(places) - len(tokens) :]
                ids += feed.ids
        if not ids:
            raise ValueError("input_ids: no token; attention_mask hides all of them")
        cache.length += input_ids.shape[1]
        return parts, ids, torch.tensor(columns, dtype=torch.int64, device=input_ids.device)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the stock class does, this code included; ``architectures`` names the stock class again, as in the export."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._name_stock_class(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """``save_pretrained(.., push_to_hub=True)`` comes here after its files are written."""
        self._name_stock_class(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _name_stock_class(self, directory) -> None:
        """Transformers writes the name of this class, which nobody but its own code knows."""
        self.config.architectures = [type(self).__name__.removeprefix(PREFIX)]
        path = Path(directory, "config.json")
        keys = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if keys.get("architectures", self.config.architectures) != self.config.architectures:
            keys["architectures"] = self.config.architectures
            path.with_suffix(".partial").write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(path.with_suffix(".partial"), path)

    def _get_logits_processor(self, *args, **kwargs):
        """Gist ids are never generated, whatever the generation configuration says."""
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.config._attn_implementation == GIST:
            reserved = list(GistSettings.of(self.config).reserved_ids)
            processors.insert(0, SuppressTokensLogitsProcessor(reserved, device=self.device))
        return processors


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, n] bool, False at padding."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    batch, n = input_ids.shape
    if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < n:
        raise ValueError(
            f"attention_mask: {tuple(attention_mask.shape)}; gist attention takes one of 0 and 1 for each token, ({batch}, {n}) "
            "or longer by what was read before"
        )
    return attention_mask[:, attention_mask.shape[1] - n :] != 0


def _spread(rows: Tensor, columns: Tensor, real: Tensor) -> Tensor:
    """rows [N, hidden] of interleaved tokens -> those of the raw tokens in their places, [B, n, hidden].

    Padding before them is zero; behind a token it is as that one, for generate() goes on from the last column.
    """
    out = rows.new_zeros(*real.shape, rows.shape[-1])
    places = real.flatten().nonzero()[:, 0].to(rows.device)
    out = out.flatten(0, 1).index_copy(0, places, rows.index_select(0, columns.to(rows.device))).view_as(out)
    if bool(real[:, -1].all()):
        return out
    last = torch.arange(real.shape[1], device=real.device).where(real, 0).cummax(1).values
    return out.gather(1, last[..., None].to(rows.device).expand_as(out))


def _first_tokens(real: Tensor, position_ids: Tensor | None) -> Tensor:
    """[B, n] bool, where a document begins: each row's first token, and others whose position is 0. They are no targets."""
    first = real & (real.cumsum(1) == 1)
    if position_ids is None:
        return first
    positions = position_ids.expand_as(real).to(real.device)
    before = torch.where(first, -1, positions.roll(1, 1))
    counts_up = (positions == 0) | (positions == before + 1)
    if not bool((counts_up | ~real).all()) or bool((first & (positions != 0)).any()):
        raise ValueError("position_ids: must count up from 0 within each document; gist attention knows no others")
    return first | (real & (positions == 0))


class GistLlamaForCausalLM(GistForCausalLM, LlamaForCausalLM):
    """Llama (and the first SmolLMs) with gists."""


class GistQwen2ForCausalLM(GistForCausalLM, Qwen2ForCausalLM):
    """Qwen2 with gists."""


class GistQwen3ForCausalLM(GistForCausalLM, Qwen3ForCausalLM):
    """Qwen3 with gists."""


class GistMistralForCausalLM(GistForCausalLM, MistralForCausalLM):
    """Mistral with gists."""


class GistSmolLM3ForCausalLM(GistForCausalLM, SmolLM3ForCausalLM):
    """SmolLM3 with gists."""


for _kind in (GistLlamaForCausalLM, GistQwen2ForCausalLM, GistQwen3ForCausalLM, GistMistralForCausalLM, GistSmolLM3ForCausalLM):
    _kind.register_for_auto_class("AutoModelForCausalLM")  # save_pretrained copies these files only of classes that are
