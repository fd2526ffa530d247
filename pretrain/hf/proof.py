"""The proof of an export: reloaded by transformers, it computes what the training code computes."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unfold.model.config import GistConfig
from unfold.model.decode.generation import Decoder
from unfold.model.gist import Recall, build_layout, build_recall, select_rule
from unfold.model.transformer import Transformer
from unfold.model.visibility import MicroBatchAttention
from unfold.pretrain.checkpoint.load import FoundRun, load_model
from unfold.pretrain.data.tokenizer import RunTokenizer
from unfold.pretrain.errors import UserError

TOLERANCE = 1e-5  # largest difference of fp32 logits between our model and the reloaded one, as a share of the largest logit
SMALLEST_SCALE = 10.0  # of logits, in that share: rounding grows with them, but a tiny model's does not vanish
PROBE_TOKENS = 256
CONTEXT_TOKENS = 192  # of them closed before the others, where the model has gists
DECODED_TOKENS = 16
ROWS = 4096  # of a matrix that are rounded at a time
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
    _release_memory()
    proof: dict = {"relative_tolerance": TOLERANCE, "probe_tokens": PROBE_TOKENS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dense = ours.pop("dense")
        proof["largest_logit_difference"] = _compare("", dense, _their_logits(directory, probe[:PROBE_TOKENS]), directory)
        del dense
        if ours:
            proof["gist"] = {"context_tokens": CONTEXT_TOKENS, "decoded_tokens": DECODED_TOKENS, "recall": sorted(ours)}
            proof["gist"] |= _compare_gists(directory, probe, ours)
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
    difference, allowed = float((theirs - ours).abs().max()), TOLERANCE * max(float(ours.abs().max()), SMALLEST_SCALE)
    if not difference <= allowed:
        raise UserError(
            f"{directory}: logits of the reloaded model {what}differ by {difference:.2e} (allowed {allowed:.0e}); not finished"
        )
    return difference


@torch.no_grad()
def _our_logits(run: FoundRun, dtype: torch.dtype, probe: Tensor) -> dict[str, Tensor]:
    """[tokens, vocab] fp32 logits by what training computes with, on the weights as they were written: dense, and with
    gists by who recalls."""
    model = load_model(run)
    for parameter in model.parameters():
        for rows in parameter.split(ROWS):
            rows.copy_(rows.to(dtype))
    device = model.head_weight.device
    ids = probe[None, :PROBE_TOKENS].to(device)
    layout = build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), None)
    hidden = model.run_layers(ids, layout.position, MicroBatchAttention("dense", layout))
    logits = {"dense": model.head_logits(hidden)[:, 0].cpu()}
    if run.config.model.attention == "gist":
        gist = run.config.gist
        for rule in {"none", "suffix", gist.recall}:  # forgetting and recall, whichever was trained: users may set the other
            changed = dataclasses.replace(gist, recall=rule)
            logits[rule] = _our_gist_logits(model, changed, run.tokenizer, probe.tolist()).cpu()
    return logits


def _our_gist_logits(model: Transformer, gist: GistConfig, tokenizer: RunTokenizer, tokens: list[int]) -> Tensor:
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
    _release_memory()  # before the next model is loaded
    return logits


def _release_memory() -> None:
    """Give the memory of a model that is gone back to the system; glibc keeps up to a tenth of it between blocks in use."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def _compare_gists(directory: Path, probe: Tensor, ours: dict[str, Tensor]) -> dict[str, float]:
    """Largest differences with gists, over who recalls; the first tokens are read at once, the others one by one."""
    model = _load(directory, trust_remote_code=True, attn_implementation="gist")
    largest = {"prefill": 0.0, "decoded": 0.0}
    for rule in sorted(ours):
        model.config.gist["recall"] = rule

        def compare(part: str, theirs: Tensor, begin: int, rule: str = rule) -> None:
            what = f"with gists ({part}), recall {rule}, "
            largest[part] = max(largest[part], _compare(what, ours[rule][begin : begin + len(theirs)], theirs, directory))

        out = model(probe[None, :PROBE_TOKENS], gist_query_start=CONTEXT_TOKENS, use_cache=True)
        compare("prefill", out.logits[0], 0)
        for i in range(PROBE_TOKENS, len(probe)):
            out = model(probe[None, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            compare("decoded", out.logits[0], i)
    return {f"largest_logit_difference_{part}": value for part, value in largest.items()}


def _prove_tokenizer(ours: RunTokenizer, directory: Path) -> None:
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
