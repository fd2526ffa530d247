"""``python -m pretrain generate``: a text, continued, or a question on a context, answered."""

from __future__ import annotations

import copy
import dataclasses
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unfold.data_prep.format.text import encodable, read_text
from unfold.pretrain.config.sizes import check_levels, parse_sizes
from unfold.pretrain.data.chat import add_chat_arguments, load_bos, load_chat, put_question, shown_prompt
from unfold.pretrain.errors import UserError
from unfold.pretrain.parts import (
    add_document_arguments,
    check_documents,
    check_fit,
    link_ids_of,
    open_store,
    refused,
    shown_documents,
)

if TYPE_CHECKING:
    from unfold.model.config import GistConfig
    from unfold.model.decode.cost import Recorder

# What a model's generation_config.json may ask for, and the command line does not: tokens are chosen as from a run.
AS_ASKED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def add_arguments(parser: ArgumentParser) -> None:
    """The command's flags."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run-dir", type=Path, metavar="DIR", help="generate from a run's checkpoint, with gists")
    source.add_argument("--model", type=Path, metavar="HF_DIR", help="generate from an exported directory, dense")
    parser.add_argument("--step", type=int, help="checkpoint of --run-dir (default: the newest whole one)")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--prompt", action="append", help="text to continue; several of them are continued together, and printed in turn"
    )
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the text to continue")
    parser.add_argument(
        "--context-file",
        type=Path,
        metavar="FILE",
        help="a text that is folded into gists first, and closed; the prompt is a question on it",
    )
    add_document_arguments(parser)
    parser.add_argument(
        "--grow",
        action="store_true",
        help="with --context-file: give prompt and answer gists as their chunks close (without a context this is always so)",
    )
    parser.add_argument(
        "--chunk-sizes", default="", metavar="C,..", help="fold with these sizes, e.g. 8,4 (default: the run's gist.chunk_sizes)"
    )
    parser.add_argument("--recall", choices=("none", "suffix", "all"), help="who unfolds chunks (default: the run's gist.recall)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 picks the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stats", action="store_true", help="tell on stderr, at the end: seconds to the first token, per token, most memory"
    )
    add_chat_arguments(parser)


def generate(args: Namespace) -> Iterator[str]:
    """Yield prompt and continuation in pieces of text as they come; of several prompts each when it is whole.

    args: of the command line, checked.
    """
    prompts = args.prompt or [_read(args.prompt_file, "--prompt-file")]
    if not all(prompts):
        raise UserError(f"--prompt-file {args.prompt_file}: is empty; give at least one character")
    pieces = (_from_run if args.run_dir else _from_export)(args, prompts)
    if args.show_prompt:
        yield "\n\n".join(piece for _, piece in pieces)
        return
    if args.chat:
        prompts = [f"{prompt}\n\n" for prompt in prompts]  # an answer is no continuation
    if len(prompts) == 1:
        _, first = next(pieces, (0, ""))  # what is wrong is told before anything is printed
        yield prompts[0] + first
        yield from (piece for _, piece in pieces)
        return
    texts = list(prompts)
    for number, piece in pieces:
        texts[number] += piece
    yield "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))


def check(args: Namespace) -> None:
    """Raise UserError for settings that are wrong whatever the model; nothing heavy is loaded for it."""
    if args.prompt and not all(args.prompt):
        raise UserError("--prompt: is empty; give at least one character")
    for flag, texts in (("--prompt", args.prompt), ("--stop", args.stop)):
        for text in texts or ():
            if problem := encodable(text):
                raise UserError(f"{flag} {ascii(text)}: {problem}")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: is below 1")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: is below 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: is not in (0, 1]")
    if not all(args.stop):
        raise UserError("--stop: is empty; give at least one character")
    given = {"--context-file": args.context_file, "--grow": args.grow, "--recall": args.recall, "--step": args.step}
    given |= {"--document": args.document, "--raw-cache": args.raw_cache == "host", "--eager": args.eager}
    given |= {"--chunk-sizes": args.chunk_sizes}
    if args.model and any(given.values()):
        names = ", ".join(name for name, value in given.items() if value)
        raise UserError(f"{names}: needs --run-dir; an exported model runs without gists")
    if args.grow and not args.context_file:
        raise UserError("--grow: needs --context-file; without a context the text always gets gists as it grows")
    check_documents(args)


def _read(path: Path, flag: str) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read as text ({error})") from None


def _sampling(args: Namespace):
    from unfold.model.decode.generation import Sampling

    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)


def _from_run(args: Namespace, prompts: list[str]) -> Iterator[tuple[int, str]]:
    context = None if args.context_file is None else _read(args.context_file, "--context-file")
    texts = [_read(path, "--document") for path in args.document]
    if texts:
        context = args.prefix  # what stands before the documents; with a template, what it writes there too
    from unfold.pretrain.checkpoint.load import find_run, load_model

    run = find_run(args.run_dir, args.step)
    info, tokenizer = run.tokenizer, run.tokenizer.tokenizer()
    encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    chat, bos = load_chat(args, info), load_bos(args, info)
    # Of each prompt (context, question); the context, with what a template writes before it, is the same for all.
    put = [put_question(encode, chat, bos, context, prompt) for prompt in prompts]
    if not all(encode(prompt) for prompt in prompts):
        raise UserError(f"{'--prompt' if args.prompt else '--prompt-file'}: has no token; give some text")
    _note_spelled(args, prompts, info.control())
    documents = [encode(text) for text in texts]
    if args.show_prompt:
        show = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        if texts:
            yield from ((n, "\n".join(shown_documents(show, parts[0], documents, parts[1]))) for n, parts in enumerate(put))
            return
        tail = "gets gists as its chunks close" if context is None else "recalls, and gets gists" if args.grow else "recalls"
        yield from ((n, "\n".join(shown_prompt(show, *parts, tail))) for n, parts in enumerate(put))
        return
    gist = run.config.folding
    if args.recall and gist is None:
        raise UserError(f"--recall: {args.run_dir} was trained with dense attention, which has nothing to recall")
    if args.chunk_sizes:
        gist = _with_sizes(args, gist, len(info.gist_ids))
    if args.recall:
        gist = dataclasses.replace(gist, recall=args.recall)
    if gist is None and (texts or args.raw_cache == "host"):
        flag, instead = ("--document", "give the texts as one --context-file") if texts else ("--raw-cache host", "leave it out")
        raise UserError(f"{flag}: {args.run_dir} was trained with dense attention, without gists; {instead}")
    links = link_ids_of(info, gist) if texts else ()
    length = check_fit(args, documents, len(put[0][0]) + len(links) * len(documents), run.config.model.max_position)
    _note_length(args, length + max(len(question) for _, question in put), run.config.model.max_position)
    from unfold.model.decode.cost import Recorder  # heavy libraries only after the arguments are checked
    from unfold.model.decode.generation import Decoder
    from unfold.model.decode.text import stream_text

    how = dict(grow=args.grow or context is None, link_ids=links, raw_cache=args.raw_cache, capture=not args.eager)
    decoder = Decoder(load_model(run), gist, info.reserved_ids, info.word_starts, **how)
    store = open_store(decoder, args) if texts else None
    recorder = Recorder(decoder.device)
    with recorder.reading():
        if store:
            with refused(args):
                first = decoder.join([store.get(tokens) for tokens in documents], put[0][0])
        else:
            first = decoder.start()
            if context is not None:
                decoder.read_context(first, put[0][0])
        # The context is read once, whatever the number of questions.
        sequences = [first, *(copy.deepcopy(first) for _ in prompts[1:])]
        for sequence, (_, question) in zip(sequences, put):
            if context is None:
                decoder.read_context(sequence, question, close=False)
            else:
                decoder.read_suffix(sequence, question)
    yield from stream_text(decoder, sequences, _sampling(args), tokenizer.decode, info.stop_ids, args.stop, recorder)
    mode = "dense" if gist is None else f"gists {','.join(map(str, gist.chunk_sizes))}, recall {gist.recall}"
    _tell(args, recorder, f"{mode}, {store.read} of {len(documents)} documents read now" if store else mode)


def _with_sizes(args: Namespace, gist: GistConfig | None, gist_ids: int) -> GistConfig:
    """How the run folds, with the chunk sizes of the command line. gist_ids: that its vocabulary has."""
    sizes = parse_sizes(args.chunk_sizes)
    if gist is None:
        raise UserError(f"--chunk-sizes {args.chunk_sizes}: {args.run_dir} was trained with dense attention, without gists")
    check_levels(sizes, gist_ids, str(args.run_dir))
    try:
        return gist.with_sizes(sizes)
    except ValueError as error:
        raise UserError(f"--chunk-sizes {args.chunk_sizes}: {error}") from None


def _note_spelled(args: Namespace, prompts: Iterable[str], control: Iterable[str]) -> None:
    """Say on stderr that control tokens in a prompt, as of a chat that was written by hand, are read as text."""
    if spelled := [name for name in control if any(name in prompt for prompt in prompts)]:
        flag = "--prompt" if args.prompt else "--prompt-file"
        print(f"note: {flag}: {', '.join(spelled)} is read as text; --chat writes a chat's control tokens", file=sys.stderr)


def _note_length(args: Namespace, length: int, most: int) -> None:
    """Say on stderr where a text of so many tokens is, or grows, longer than the model is meant for."""
    if length + args.max_new_tokens > most:
        print(
            f"note: {length} tokens and up to {args.max_new_tokens} new ones, but the model is meant for {most} "
            "(model.max_position); what it writes beyond them is hardly of use",
            file=sys.stderr,
            flush=True,
        )


def _tell(args: Namespace, recorder: Recorder, mode: str) -> None:
    if args.stats:
        print(f"\n{mode}: {recorder.describe()}", file=sys.stderr)


def _from_export(args: Namespace, prompts: list[str]) -> Iterator[tuple[int, str]]:
    directory, sampling = args.model, _sampling(args)
    if not (directory / "config.json").is_file():
        raise UserError(f"--model {directory}: is not an exported model (it has no config.json)")
    import torch

    from unfold.model.decode.cost import Recorder
    from unfold.pretrain.hf.reload import reload_model, reload_tokenizer

    tokenizer = reload_tokenizer(directory)
    plain = dict(add_special_tokens=False, split_special_tokens=True)  # a control token that a text spells stays text
    encode: Callable[[str], list[int]] = lambda text: tokenizer(text, **plain)["input_ids"]
    _note_spelled(args, prompts, [t.content for t in tokenizer.added_tokens_decoder.values() if t.special])
    info = _tokenizer_of_export(directory, tokenizer)
    chat, bos = load_chat(args, info), load_bos(args, info)
    put = [put_question(encode, chat, bos, None, prompt)[1] for prompt in prompts]
    if args.show_prompt:
        show = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        yield from ((n, "\n".join(shown_prompt(show, (), ids, "is read without gists"))) for n, ids in enumerate(put))
        return
    model = reload_model(directory)
    _note_length(args, max(map(len, put)), model.config.max_position_embeddings)
    torch.manual_seed(sampling.seed)
    how = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0, **AS_ASKED}
    if sampling.temperature:  # transformers would choose among the 50 likeliest
        how |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if args.stop:
        how |= {"stop_strings": args.stop, "tokenizer": tokenizer}
    recorder = Recorder(model.device)
    for number, ids in enumerate(put):
        recorder.begin()
        inputs = torch.tensor([ids], device=model.device)
        out = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **how, streamer=_Ticks(recorder))
        text = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        ends = [at for at in (text.find(stop) for stop in args.stop) if at >= 0]
        yield number, text[: min(ends, default=len(text))]
    _tell(args, recorder, "dense")


class _Ticks:
    """What generate() of transformers calls a streamer: it is given the prompt, then every token."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.prompted = recorder, False

    def put(self, ids) -> None:
        if self.prompted:
            self.recorder.token()
        self.prompted = True

    def end(self) -> None:
        pass


def _tokenizer_of_export(directory: Path, tokenizer):
    """A Hugging Face directory's tokenizer as chats are written with it."""
    import numpy as np

    from unfold.pretrain.data.tokenizer import RunTokenizer

    ids = {f"{role}_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    kind = {"kind": "huggingface", "vocab_size": len(tokenizer), "gist_ids": (), "gist_tokens": (), "hash": ""}
    return RunTokenizer(**kind, **ids, directory=directory, word_starts=np.zeros(0, bool))
