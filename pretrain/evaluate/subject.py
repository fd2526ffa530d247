"""What is evaluated: a model, and the ways in which its attention is read (*variants*: a mode, and chunk sizes)."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from unfold.model.config import GistConfig
from unfold.pretrain.config.sizes import check_levels, parse_sizes
from unfold.pretrain.errors import UserError

if TYPE_CHECKING:
    from unfold.data_prep.format.tokenizer import TokenizerInfo
    from unfold.model.decode.generation import Decoder
    from unfold.model.transformer import Transformer
    from unfold.pretrain.data.chat import Chat
    from unfold.pretrain.data.tokenizer import RunTokenizer

MODES = ("dense", "forget", "recall")
LINKED = ("linked-forget", "linked-recall")  # documents are read one by one, and joined
DTYPES = ("fp32", "bf16")
NO_GISTS = (8, 4)  # chunk sizes for a model that says nothing of gists


@dataclass(frozen=True)
class Variant:
    """One way of reading a model.

    Attributes:
        mode: dense (every raw token sees all before it; no gists), forget (gists, nothing recalls) or recall.
        gist: how tokens are folded; None when dense.
        linked: whether documents are read one by one and joined by links, in place of one joined text.
    """

    mode: str
    gist: GistConfig | None
    linked: bool = False

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        return self.gist.chunk_sizes if self.gist else ()

    @property
    def ratio(self) -> int:
        """Raw tokens per top-level gist; 1 when dense."""
        return self.gist.ratio if self.gist else 1

    @property
    def name(self) -> str:
        return f"{'linked ' if self.linked else ''}{self.mode} {','.join(map(str, self.chunk_sizes))}".strip()

    def recalling(self, who: str) -> GistConfig | None:
        """Its gists, where ``who`` ('suffix' or 'all') recalls if this variant's mode does; None when dense."""
        return self.gist and dataclasses.replace(self.gist, recall=who if self.mode == "recall" else "none")

    def to_dict(self) -> dict:
        sizes = {"chunk_sizes": list(self.chunk_sizes), "ratio": self.ratio}
        return {"name": self.name, "mode": self.mode, **sizes, **({"linked": True} if self.linked else {})}


@dataclass(frozen=True)
class Subject:
    """A loaded model and how it is to be read.

    Attributes:
        name: what the user called it by, with the step of a run.
        model: on one rank, in eval mode.
        variants: of which results stand side by side.
        raw_tokens: raw tokens of a training sample.
        chat: how questions are put; None: as they are.
        bos: begins what is read without a chat template.
        raw_cache: where keys and values of raw tokens are kept while answering with gists: device or host.
        capture: whether a GPU replays decoding steps from CUDA graphs.
    """

    name: str
    model: Transformer
    tokenizer: RunTokenizer
    variants: tuple[Variant, ...]
    raw_tokens: int
    chat: Chat | None = None
    raw_cache: str = "device"
    bos: tuple[int, ...] = ()
    capture: bool = True

    @property
    def max_position(self) -> int:
        """Longest raw sequence that the model is meant for."""
        return self.model.config.max_position

    @cached_property
    def _codec(self):
        return self.tokenizer.tokenizer()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self._codec.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._codec.decode(list(ids))

    def show(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens by name."""
        return self._codec.decode(list(ids), skip_special_tokens=False)

    def prompt(
        self, context: str, question: str, opening: str = "", chat: bool = True, separator: str = ""
    ) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows it.

        Args:
            context, question: texts that follow each other.
            opening: the answer's first words.
            chat: whether a chat template is used, if there is one.
            separator: stands between the two in a chat.

        Raises:
            UserError: the chat template does not take it.
        """
        if self.chat and chat:
            return self.chat.prompt(context, question, opening, separator)
        return [*self.bos, *self.encode(context)], self.encode(question + opening)

    def continuation(self, before: str, text: str) -> list[int]:
        """Ids of ``text`` as it is written after ``before``."""
        whole, head = self.encode(before + text), self.encode(before)
        return whole[len(head) :] if whole[: len(head)] == head else self.encode(text)

    def decoder(self, variant: Variant) -> Decoder:
        """Reads contexts, which are folded, and suffixes, which recall if the variant does."""
        from unfold.model.decode.generation import Decoder

        tokenizer, gist = self.tokenizer, variant.recalling("suffix")
        links = tokenizer.link_ids[: gist.links] if variant.linked else ()
        raw_cache = self.raw_cache if gist else "device"  # a dense step reads every raw token
        own = tokenizer.reserved_ids, tokenizer.word_starts
        return Decoder(self.model, gist, *own, link_ids=links, raw_cache=raw_cache, capture=self.capture)

    def check_length(self, length: int, flag: str) -> None:
        """Raises UserError when a sequence of so many raw tokens is longer than the model is meant for."""
        if length > self.max_position:
            raise UserError(
                f"{flag}: {length} raw tokens, but the model is meant for at most {self.max_position} (model.max_position); "
                "give a smaller length"
            )

    def to_dict(self) -> dict:
        """What results say of the model."""
        return {"model": self.name, "max_position": self.max_position, "variants": [v.to_dict() for v in self.variants]}


def add_subject_arguments(parser: ArgumentParser, linked: bool = False) -> None:
    """Flags of a model and its variants. linked: whether documents may be read one by one."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run-dir", type=Path, metavar="DIR", help="evaluate a run's checkpoint")
    source.add_argument("--model", type=Path, metavar="HF_DIR", help="evaluate a Hugging Face directory, an export or any other")
    parser.add_argument("--step", type=int, help="checkpoint of --run-dir (default: the newest whole one)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="of --model: the one that shards were made with (default: its own)",
    )
    choices = (*MODES, *LINKED) if linked else MODES
    parser.add_argument(
        "--mode", choices=choices, nargs="+", help="ways to attend, side by side (default: all; of a dense model: dense)"
    )
    if linked:
        parser.add_argument(
            "--links", type=int, metavar="N", help="linked: links of a document (default: the model's gist.links)"
        )
    parser.add_argument(
        "--chunk-sizes",
        nargs="+",
        metavar="C,..",
        help="chunk sizes that forget and recall are evaluated with, side by side, e.g. 8 8,4 (default: the model's own)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--topk", type=int, metavar="N", help="recall: gists per level and query head")
    budget.add_argument("--top-p", type=float, metavar="P", help="recall: the fewest gists whose softmax reaches this")
    budget.add_argument("--budget-ratio", type=int, metavar="R", help="recall: ratio of the adaptive budget")
    parser.add_argument("--share", choices=("head", "group"), help="recall: who selects (default: the model's gist.share)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and activations (default fp32)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where JSON and PNG files are written")


def load_subject(args: Namespace) -> Subject:
    """Load the model of the command line; variants that cannot be are refused before its weights are read.

    Raises:
        UserError: no such model, or settings that do not fit it.
    """
    if args.model and args.step is not None:
        raise UserError("--step: needs --run-dir; a Hugging Face directory has one state")
    if args.run_dir and args.tokenizer:
        raise UserError("--tokenizer: needs --model; a run has its own")
    from unfold.pretrain.checkpoint.load import find_run
    from unfold.pretrain.hf.directory import read_gists, read_keys

    if args.run_dir:
        found = find_run(args.run_dir, args.step)
        own = found.config.folding
        variants = make_variants(args, own, found.tokenizer, str(args.run_dir))
        return _loaded(f"{args.run_dir} step {found.manifest.step}", found, variants, args)
    own = read_gists(args.model, read_keys(args.model))
    wanted = [parse_sizes(text) for text in args.chunk_sizes or []] + [own.chunk_sizes if own else NO_GISTS]
    with tempfile.TemporaryDirectory(prefix="unfold-evaluate-") as scratch:
        # Imported as for training: any family that import knows, its tokenizer, and gist rows where it has none.
        imported = _import(args, Path(scratch) / "model", max(len(sizes) for sizes in wanted))
        found = find_run(imported, None)
        variants = make_variants(args, own, found.tokenizer, str(args.model))
        subject = _loaded(str(args.model), found, variants, args)
        subject.encode("")  # the tokenizer is read while it is there
        return subject


def make_variants(args: Namespace, own: GistConfig | None, tokenizer: TokenizerInfo, name: str) -> tuple[Variant, ...]:
    """Every mode with every chunk sizes.

    Args:
        args: of the command line.
        own: what the model was trained with; None: dense.
        tokenizer: the vocabulary's gists and links.
        name: of the model, for messages.

    Raises:
        UserError: a setting is wrong, or asks for more levels than the vocabulary has gists, or more links than it has.
    """
    base, may_link = own or GistConfig(NO_GISTS), "links" in vars(args)
    if may_link and args.links is not None:
        base = _replaced(base, {"links": args.links})
    enough = base.links <= len(tokenizer.link_ids)
    default = (*MODES, *(LINKED if may_link and enough else ())) if own else ("dense",)
    modes = list(dict.fromkeys(args.mode or default))
    asked = [f"--mode {mode}" for mode in modes if mode in LINKED]
    if may_link and args.links is not None:
        asked.append(f"--links {args.links}")
    if not enough and asked:
        there = len(tokenizer.link_ids)
        raise UserError(
            f"{asked[0]}: documents have {base.links} links each (gist.links), but {name} has {there} link ids; "
            f"give --links {there}"
        )
    folds = [mode for mode in modes if mode != "dense"]
    budget = {name: getattr(args, name) for name in ("topk", "top_p", "budget_ratio") if getattr(args, name) is not None}
    chosen = {**budget, **({"share": args.share} if args.share else {})}
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in chosen)
    if chosen and not any(mode.endswith("recall") for mode in modes):
        raise UserError(f"{flags}: sets what recall selects; add --mode recall")
    if args.chunk_sizes and not folds:
        raise UserError("--chunk-sizes: folds tokens into gists; add --mode forget or --mode recall")
    if folds and own is None:
        print(f"note: {name} was not trained with gists; what forget and recall show is the untrained method", file=sys.stderr)
    several = list(dict.fromkeys(parse_sizes(text) for text in args.chunk_sizes or [])) or [base.chunk_sizes]
    none = {"topk": None, "top_p": None, "budget_ratio": None, "unfold_all": False} if budget else {}
    gists = []
    for sizes in several if folds else []:
        check_levels(sizes, len(tokenizer.gist_ids), name)
        gists.append(_replaced(base, {"chunk_sizes": sizes, "choices": (), **none, **chosen}))
    of_mode = lambda mode: [Variant(mode.removeprefix("linked-"), gist, mode in LINKED) for gist in gists]
    return tuple(v for mode in modes for v in ([Variant("dense", None)] if mode == "dense" else of_mode(mode)))


def _replaced(gist: GistConfig, changes: dict) -> GistConfig:
    try:
        return dataclasses.replace(gist, **changes)
    except ValueError as error:
        raise UserError(f"gist settings of the command line: {error}") from None


def _import(args: Namespace, output: Path, levels: int) -> Path:
    from unfold.pretrain.hf.import_model import import_model

    levels = levels if args.tokenizer else max(4, levels)  # of one that is made now, as many as import makes
    others = {"tokenizer": args.tokenizer, "gist_rows": None, "dtype": None}
    return import_model(Namespace(input=args.model, output=output, chunk_sizes="", gist_levels=levels, links=0, **others))


def _loaded(name: str, found, variants: tuple[Variant, ...], args: Namespace) -> Subject:
    import torch

    from unfold.pretrain.checkpoint.load import load_model
    from unfold.pretrain.data.chat import load_bos, load_chat

    chat, bos = load_chat(args, found.tokenizer), load_bos(args, found.tokenizer)
    model = load_model(found)
    if args.dtype == "bf16":
        model = model.to(torch.bfloat16)
    flags = vars(args)  # commands that write no answers have not all of them
    how = dict(raw_cache=flags.get("raw_cache", "device"), capture=not flags.get("eager", False))
    return Subject(name, model, found.tokenizer, variants, found.config.data.raw_tokens, chat, bos=bos, **how)
