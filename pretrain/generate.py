"""``python -m pretrain generate``: a text, continued."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from model.generation import Sampling, generate_tokens
from pretrain.errors import UserError


def generate(args: Namespace) -> Iterator[str]:
    """Yield the prompt, then the continuation in pieces of text as they come. args: of the command line."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: is below 1")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: is below 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: is not in (0, 1]")
    if not args.prompt:
        raise UserError("--prompt: is empty; give at least one character")
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    yield args.prompt
    yield from _from_run(args, sampling) if args.run_dir else _from_export(args.model, args.prompt, sampling)


def _from_run(args: Namespace, sampling: Sampling) -> Iterator[str]:
    from pretrain.load import load_run  # heavy libraries only after the arguments are checked

    run = load_run(args.run_dir, args.step)
    tokenizer = run.tokenizer.tokenizer()
    prompt = tokenizer.encode(args.prompt, add_special_tokens=False).ids
    stop = [i for i in (run.tokenizer.eos_id,) if i is not None]
    gist = run.config.gist if run.config.model.attention == "gist" else None
    tokens = generate_tokens(
        run.model, prompt, gist, run.tokenizer.gist_ids, run.tokenizer.word_starts, stop, sampling
    )
    yield from _decode(tokenizer, prompt, tokens)


def _decode(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Text of the tokens as it becomes certain: a character may need several byte tokens."""
    ids, shown = list(prompt), tokenizer.decode(prompt)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        yield text[len(shown) :]
        shown = text


def _from_export(directory: Path, prompt: str, sampling: Sampling) -> Iterator[str]:
    if not (directory / "config.json").is_file():
        raise UserError(f"--model {directory}: is not an exported model (it has no config.json)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(sampling.seed)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    out = model.generate(**inputs, max_new_tokens=sampling.max_new_tokens, **(how or {"do_sample": False}))
    yield tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
