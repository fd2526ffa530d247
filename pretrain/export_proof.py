"""The proof of an export: reloaded by transformers, it computes what the training code computes."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.attention import MicroBatchAttention
from model.config import GistConfig
from model.generation import Decoder
from model.gist import Recall, build_layout, build_recall, select_rule
from model.transformer import Transformer
from pretrain.errors import UserError
from pretrain.load import FoundRun, load_model
from pretrain.tokenizer import TokenizerInfo

TOLERANCE = 1e-4  # largest difference of fp32 logits between our model and the reloaded one
PROBE_TOKENS = 256
CONTEXT_TOKENS = 192  # of them closed before the others, where the model has gists
DECODED_TOKENS = 16
TEXTS = (
    "The state of the Union.", "  two  spaces\n\ttab", "na\u00efve caf\u00e9 \u4e16\u754c \U0001f30d", "1789, 2,026",
    "def f(x):\n        return x  # code\n", " a\u00a0b \u200b\r\n", "", "https://example.org/?q=1&r=%20",
)  # fmt: skip


def prove(run: FoundRun, directory: Path, dtype: torch.dtype) -> dict:
    """Reload with transformers and compare: logits dense and with gists, loading report, tokenizer.

    One model is in memory at a time, in fp32.

    Returns:
        The figures.

    Raises:
        UserError: on any difference.
    """
    tokenizer, model = run.tokenizer, run.config.model
    _prove_tokenizer(tokenizer, directory)
    probe = _probe(model.vocab_size, tokenizer.gist_ids)
    ours = _our_logits(run, dtype, probe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = {"dense": _their_logits(directory, probe[:PROBE_TOKENS])}
        if rules := sorted(ours.keys() - {"dense"}):
            theirs |= _their_gist_logits(directory, probe, rules)
    proof: dict = {"tolerance": TOLERANCE, "probe_tokens": PROBE_TOKENS}
    proof["largest_logit_difference"] = _compare("", ours["dense"], theirs["dense"], directory)
    if rules:
        proof["gist"] = {"context_tokens": CONTEXT_TOKENS, "decoded_tokens": DECODED_TOKENS, "recall": rules}
        for part, at in {"prefill": slice(PROBE_TOKENS), "decoded": slice(PROBE_TOKENS, None)}.items():
            compare = lambda rule: _compare(f"with gists ({part}), recall {rule}, ", ours[rule][at], theirs[rule][at], directory)  # noqa: B023
            proof["gist"][f"largest_logit_difference_{part}"] = max(map(compare, rules))
    import transformers

    return proof | {
        "warnings": sorted({str(w.message) for w in caught if "transformers" in (w.filename or "")}),
        "transformers": transformers.__version__,
        "step": run.manifest.step,
        "tokenizer_hash": tokenizer.hash,
    }


def _probe(vocab_size: int, gist_ids: Sequence[int]) -> Tensor:
    """[PROBE_TOKENS + DECODED_TOKENS] int64 ids, no gists."""
    raw = np.setdiff1d(np.arange(vocab_size), gist_ids)
    return torch.from_numpy(np.random.default_rng(0).choice(raw, PROBE_TOKENS + DECODED_TOKENS))


def _compare(what: str, ours: Tensor, theirs: Tensor, directory: Path) -> float:
    difference = float((theirs - ours).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"{directory}: logits of the reloaded model {what}differ by {difference:.2e} (allowed {TOLERANCE:.0e}); not finished"
        )
    return difference


@torch.no_grad()
def _our_logits(run: FoundRun, dtype: torch.dtype, probe: Tensor) -> dict[str, Tensor]:
    """[tokens, vocab] fp32 logits by what training computes with, on the weights as they were written: dense, and with
    gists by who recalls."""
    model = load_model(run)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    device = model.head_weight.device
    ids = probe[None, :PROBE_TOKENS].to(device)
    layout = build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), GistConfig((ids.shape[1] + 1,)))
    hidden = model.run_layers(ids, layout.position, MicroBatchAttention("dense", layout))
    logits = {"dense": model.head_logits(hidden)[:, 0].cpu()}
    if run.config.model.attention == "gist":
        gist = run.config.gist
        for rule in {"none", "suffix", gist.recall}:  # forgetting and recall, whichever was trained: users may set the other
            changed = dataclasses.replace(gist, recall=rule)
            logits[rule] = _our_gist_logits(model, changed, run.tokenizer, probe.tolist()).cpu()
    return logits


def _our_gist_logits(model: Transformer, gist: GistConfig, tokenizer: TokenizerInfo, tokens: list[int]) -> Tensor:
    """Of a closed context and what follows it, computed in one pass."""
    decoder = Decoder(model, gist, tokenizer.gist_ids, tokenizer.word_starts)
    sequence = decoder.start()
    decoder.read_context(sequence, tokens[:CONTEXT_TOKENS])
    decoder.read_suffix(sequence, tokens[CONTEXT_TOKENS:])
    level = torch.tensor(sequence.level, device=decoder.device)[None]
    layout, recall = build_layout(level, torch.zeros_like(level), gist), None
    if any(sequence.recalls):
        recalls = torch.tensor(sequence.recalls, device=decoder.device)[None]
        recall = Recall(build_recall(layout, gist, recalls), select_rule(gist))
    return model.logits(torch.tensor(sequence.ids, device=decoder.device)[None], layout, recall)[0][level[0] < 0]


def _load(directory: Path, **how):
    """The directory through transformers, in fp32. Raises UserError unless everything in it found its place."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype=torch.float32, **how)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if problems:
        raise UserError(f"{directory}: transformers reports {problems} on loading; the export was not finished")
    return model.eval()


@torch.no_grad()
def _their_logits(directory: Path, probe: Tensor) -> Tensor:
    logits = _load(directory)(probe[None]).logits[0]
    gc.collect()  # before the next model is loaded
    return logits


@torch.no_grad()
def _their_gist_logits(directory: Path, probe: Tensor, rules: Sequence[str]) -> dict[str, Tensor]:
    """By who recalls; the first tokens at once, the others one by one through the cache."""
    model, result = _load(directory, trust_remote_code=True, attn_implementation="gist"), {}
    for rule in rules:
        model.config.gist["recall"] = rule
        out = model(probe[None, :PROBE_TOKENS], gist_query_start=CONTEXT_TOKENS, use_cache=True)
        logits = [out.logits[0]]
        for token in probe[PROBE_TOKENS:]:
            out = model(token[None, None], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
        result[rule] = torch.cat(logits)
    return result


def _prove_tokenizer(ours: TokenizerInfo, directory: Path) -> None:
    """The reloaded tokenizer gives the ids of ours, with and without the tokens that it adds, and text from them again."""
    from transformers import AutoTokenizer

    reloaded, encoder = AutoTokenizer.from_pretrained(directory), ours.tokenizer()
    if len(reloaded) > ours.vocab_size:
        raise UserError(f"{directory}: the reloaded tokenizer has {len(reloaded)} ids, expected {ours.vocab_size}; not finished")
    for text in TEXTS:
        for special in (False, True):
            expected = encoder.encode(text, add_special_tokens=special).ids
            got = reloaded.encode(text, add_special_tokens=special)
            if got != expected:
                how = "with special tokens " if special else ""
                raise UserError(
                    f"{directory}: the reloaded tokenizer gives {got} for {text!r} {how}, expected {expected}; not finished"
                )
        ids = encoder.encode(text, add_special_tokens=False).ids
        if (got := reloaded.decode(ids)) != (expected := encoder.decode(ids, skip_special_tokens=False)):
            raise UserError(f"{directory}: the reloaded tokenizer decodes {ids} to {got!r}, expected {expected!r}; not finished")


def file_hashes(directory: Path, known: dict[str, dict]) -> dict[str, str]:
    """SHA-256 of every file of a directory; ``known``: those of weight files, as they were written."""
    result = {name: entry["sha256"] for name, entry in known.items()}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name not in result and path.stat().st_size:
            result[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(sorted(result.items()))
