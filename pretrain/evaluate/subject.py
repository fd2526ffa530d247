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
from unfold.pretrain.errors import UserError

if TYPE_CHECKING:
    from unfold.model.decode.generation import Decoder
    from unfold.model.transformer import Transformer
    from unfold.pretrain.data.tokenizer import RunTokenizer

MODES = ("dense", "forget", "recall")
DTYPES = ("fp32", "bf16")
NO_GISTS = (8, 4)  # chunk sizes for a model that says nothing of gists


@dataclass(frozen=True)
class Variant:
    """One way of reading a model.

    Attributes:
        mode: dense (every raw token sees all before it; no gists), forget (gists, nothing recalls) or recall.
        gist: how tokens are folded; None when dense.
    """

    mode: str
    gist: GistConfig | None

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        return self.gist.chunk_sizes if self.gist else ()

    @property
    def ratio(self) -> int:
        """Raw tokens per top-level gist; 1 when dense."""
        return self.gist.ratio if self.gist else 1

    @property
    def name(self) -> str:
        return f"{self.mode} {','.join(map(str, self.chunk_sizes))}".strip()

    def recalling(self, who: str) -> GistConfig | None:
        """Its gists, where ``who`` ('suffix' or 'all') recalls if this variant's mode does; None when dense."""
        return self.gist and dataclasses.replace(self.gist, recall=who if self.mode == "recall" else "none")

    def to_dict(self) -> dict:
        return {"name": self.name, "mode": self.mode, "chunk_sizes": list(self.chunk_sizes), "ratio": self.ratio}


@dataclass(frozen=True)
class Subject:
    """A loaded model and how it is to be read.

    Attributes:
        name: what the user called it by, with the step of a run.
        model: on one rank, in eval mode.
        variants: of which results stand side by side.
        raw_tokens: raw tokens of a training sample.
    """

    name: str
    model: Transformer
    tokenizer: RunTokenizer
    variants: tuple[Variant, ...]
    raw_tokens: int

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

    def continuation(self, before: str, text: str) -> list[int]:
        """Ids of ``text`` as it is written after ``before``."""
        whole, head = self.encode(before + text), self.encode(before)
        return whole[len(head) :] if whole[: len(head)] == head else self.encode(text)

    def decoder(self, variant: Variant) -> Decoder:
        """Reads contexts, which are folded, and suffixes, which recall if the variant does."""
        from unfold.model.decode.generation import Decoder

        return Decoder(self.model, variant.recalling("suffix"), self.tokenizer.reserved_ids, self.tokenizer.word_starts)

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


def add_subject_arguments(parser: ArgumentParser) -> None:
    """Flags of a model and its variants."""
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
    parser.add_argument(
        "--mode", choices=MODES, nargs="+", help="ways to attend, side by side (default: all three; of a dense model: dense)"
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
        variants = make_variants(args, own, len(found.tokenizer.gist_ids), str(args.run_dir))
        return _loaded(f"{args.run_dir} step {found.manifest.step}", found, variants, args.dtype)
    own = read_gists(args.model, read_keys(args.model))
    wanted = [_sizes(text) for text in args.chunk_sizes or []] + [own.chunk_sizes if own else NO_GISTS]
    with tempfile.TemporaryDirectory(prefix="unfold-evaluate-") as scratch:
        # Imported as for training: any family that import knows, its tokenizer, and gist rows where it has none.
        imported = _import(args, Path(scratch) / "model", max(len(sizes) for sizes in wanted))
        found = find_run(imported, None)
        variants = make_variants(args, own, len(found.tokenizer.gist_ids), str(args.model))
        subject = _loaded(str(args.model), found, variants, args.dtype)
        subject.encode("")  # the tokenizer is read while it is there
        return subject


def make_variants(args: Namespace, own: GistConfig | None, gist_ids: int, name: str) -> tuple[Variant, ...]:
    """Every mode with every chunk sizes.

    Args:
        args: of the command line.
        own: what the model was trained with; None: dense.
        gist_ids: how many the vocabulary has.
        name: of the model, for messages.

    Raises:
        UserError: a setting is wrong, or asks for more levels than the vocabulary has gists.
    """
    modes = list(dict.fromkeys(args.mode or (MODES if own else ("dense",))))
    folds = [mode for mode in modes if mode != "dense"]
    budget = {name: getattr(args, name) for name in ("topk", "top_p", "budget_ratio") if getattr(args, name) is not None}
    chosen = {**budget, **({"share": args.share} if args.share else {})}
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in chosen)
    if chosen and "recall" not in modes:
        raise UserError(f"{flags}: sets what recall selects; add --mode recall")
    if args.chunk_sizes and not folds:
        raise UserError("--chunk-sizes: folds tokens into gists; add --mode forget or --mode recall")
    base = own or GistConfig(NO_GISTS)
    if folds and own is None:
        print(f"note: {name} was not trained with gists; what forget and recall show is the untrained method", file=sys.stderr)
    several = list(dict.fromkeys(_sizes(text) for text in args.chunk_sizes or [])) or [base.chunk_sizes]
    none = {"topk": None, "top_p": None, "budget_ratio": None, "unfold_all": False} if budget else {}
    variants = [Variant("dense", None)] if "dense" in modes else []
    for sizes in several if folds else []:
        if len(sizes) > gist_ids:
            text = ",".join(map(str, sizes))
            raise UserError(f"--chunk-sizes {text}: {len(sizes)} levels, but {name} has {gist_ids} gist ids; give fewer levels")
        try:
            gist = dataclasses.replace(base, chunk_sizes=sizes, **{**none, **chosen})
        except ValueError as error:
            raise UserError(f"gist settings of the command line: {error}") from None
        variants += [Variant(mode, gist) for mode in folds]
    return tuple(sorted(variants, key=lambda v: modes.index(v.mode)))


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise UserError(f"--chunk-sizes {text}: expected numbers such as 8,4") from None


def _import(args: Namespace, output: Path, levels: int) -> Path:
    from unfold.pretrain.hf.import_model import import_model

    levels = levels if args.tokenizer else max(4, levels)  # of one that is made now, as many as import makes
    others = {"tokenizer": args.tokenizer, "gist_rows": None, "dtype": None}
    return import_model(Namespace(input=args.model, output=output, chunk_sizes="", gist_levels=levels, links=0, **others))


def _loaded(name: str, found, variants: tuple[Variant, ...], dtype: str) -> Subject:
    import torch

    from unfold.pretrain.checkpoint.load import load_model

    model = load_model(found)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    return Subject(name, model, found.tokenizer, variants, found.config.data.raw_tokens)
