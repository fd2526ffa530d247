"""The proof of an export: reloaded by transformers, it computes what the training code computes."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from unfold.model.config import GistConfig
from unfold.model.decode.generation import Decoder
from unfold.model.gist import Recall, build_layout
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
GENERATED_TOKENS = 12  # by generate(), of each of two prompts
PROMPTS = (96, 57)  # raw tokens of those; the shorter one is padded on the left
BEAMS = 3
ROWS = 4096  # of a matrix that are rounded at a time
TEXTS = (
    "The state of the Union.", "  two  spaces\n\ttab", "na\u00efve caf\u00e9 \u4e16\u754c \U0001f30d", "1789, 2,026",
    "e\u0301 \ufb01 A\u030a don't DON'T", "def f(x):\n        return x  # code\n", " a\u00a0b \u200b\r\n", "", "https://example.org/?q=1&r=%20",
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
    prove_tokenizer(tokenizer, directory)
    probe = _probe(model.vocab_size, tokenizer.reserved_ids)
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
            proof["generate"] = prove_generate(directory, probe, tokenizer)
    import transformers

    return proof | {
        "warnings": sorted({str(w.message) for w in caught if "transformers" in (w.filename or "")}),
        "transformers": transformers.__version__,
        "step": run.manifest.step,
        "tokenizer_hash": tokenizer.hash,
    }


def compare_dense(run: FoundRun, directory: Path, load: Callable[[], nn.Module]) -> float:
    """The largest difference between a checkpoint's dense logits and those of the model that ``load`` makes, both in fp32.

    Raises:
        UserError: it is too large; names ``directory``.
    """
    probe = _probe(run.config.model.vocab_size, run.tokenizer.reserved_ids)[:PROBE_TOKENS]
    with torch.no_grad():
        ours = _dense_logits(load_model(run), probe)
        _release_memory()
        return _compare("", ours, load()(probe[None]).logits[0], directory)


def _probe(vocab_size: int, reserved: Sequence[int]) -> Tensor:
    """[PROBE_TOKENS + DECODED_TOKENS] int64 ids, no gists or links."""
    raw = np.setdiff1d(np.arange(vocab_size), reserved)
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
    logits = {"dense": _dense_logits(model, probe)}
    if run.config.model.attention == "gist":
        gist = run.config.gist
        for rule in {"none", "suffix", gist.recall}:  # forgetting and recall, whichever was trained: users may set the other
            changed = dataclasses.replace(gist, recall=rule)
            logits[rule] = _our_gist_logits(model, changed, run.tokenizer, probe.tolist()).cpu()
    return logits


def _dense_logits(model: Transformer, probe: Tensor) -> Tensor:
    ids = probe[None, :PROBE_TOKENS].to(model.head_weight.device)
    layout = build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), None)
    hidden = model.run_layers(ids, layout.position, MicroBatchAttention(model.config.kinds_with(gists=False), layout))
    return model.head_logits(hidden)[:, 0].cpu()


def _our_gist_logits(model: Transformer, gist: GistConfig, tokenizer: RunTokenizer, tokens: list[int]) -> Tensor:
    """Of a closed context and what follows it, computed in one pass."""
    decoder = Decoder(model, gist, tokenizer.reserved_ids, tokenizer.word_starts)
    sequence = decoder.start()
    decoder.read_context(sequence, tokens[:CONTEXT_TOKENS])
    decoder.read_suffix(sequence, tokens[CONTEXT_TOKENS:])
    level = torch.tensor(sequence.level, device=decoder.device)[None]
    layout = build_layout(level, torch.zeros_like(level), gist)
    recall = Recall.of(layout, gist, torch.tensor(sequence.recalls, device=decoder.device)[None])
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
            out = model(probe[None, i : i + 1], use_cache=True, **cache_of(out))
            compare("decoded", out.logits[0], i)
    return {f"largest_logit_difference_{part}": value for part, value in largest.items()}


def cache_of(output) -> dict:
    """The cache of a forward pass, as an argument of the next one: transformers 5.24 renamed it."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


@torch.no_grad()
def prove_generate(directory: Path, probe: Tensor, tokenizer: RunTokenizer) -> dict:
    """generate() of the reloaded model with gists, as users call it: a batch of two with padding on the left, greedily and by
    beams, and what a tokenizer returns. Each token must be one that the model itself, reading without a cache, would take.

    Raises:
        UserError: it fails, emits a gist, or gives other tokens.
    """
    from transformers import AutoTokenizer, GenerationConfig

    model = _load(directory, trust_remote_code=True, attn_implementation="gist")
    # Its own defaults (sampling, penalties) are another matter; padding is told by the mask, so its id says nothing.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=GENERATED_TOKENS)
    prompts = [probe[:n] for n in PROMPTS]
    width = max(PROMPTS)
    batch = {"input_ids": torch.zeros(2, width, dtype=torch.int64), "attention_mask": torch.zeros(2, width, dtype=torch.int64)}
    for i, prompt in enumerate(prompts):
        batch["input_ids"][i, width - len(prompt) :], batch["attention_mask"][i, width - len(prompt) :] = prompt, 1
    starts = torch.tensor([2 * n // 3 for n in PROMPTS])
    batch["gist_query_start"] = starts
    how = {"return_dict_in_generate": True, "output_scores": True}
    try:
        greedy = model.generate(**batch, **how).sequences[:, width:]
        beams = model.generate(**batch, **how, num_beams=BEAMS)
        plain = AutoTokenizer.from_pretrained(directory)(TEXTS[0], return_tensors="pt")
        model.generate(**plain, max_new_tokens=2)
    except (TypeError, ValueError, AttributeError, NotImplementedError, IndexError, RuntimeError) as error:
        raise UserError(f"{directory}: generate() with gists fails ({error}); not finished") from error
    found = torch.cat([greedy, beams.sequences[:, width:]])
    if torch.isin(found, torch.tensor(tokenizer.reserved_ids)).any():
        raise UserError(f"{directory}: generate() with gists emits an id of a gist or link; not finished")
    largest = 0.0
    for i, (prompt, start) in enumerate(zip(prompts, starts.tolist())):
        read = lambda new, prompt=prompt, start=start: _read_again(model, prompt, new, start)
        logits = read(greedy[i])
        logits[:, list(tokenizer.reserved_ids)] = -torch.inf
        chosen = logits.gather(1, greedy[i][:, None])[:, 0]
        largest = max(largest, _compare("that generate() took ", logits.max(1).values, chosen, directory))
        new = beams.sequences[i, width:]
        total = read(new).log_softmax(1).gather(1, new[:, None]).sum()
        score = beams.sequences_scores[i] * GENERATED_TOKENS
        largest = max(largest, _compare("of generate()'s beams, summed, ", total, score, directory))
    return {"prompts": list(PROMPTS), "tokens": GENERATED_TOKENS, "beams": BEAMS, "largest_difference": largest}


def _read_again(model, prompt: Tensor, new: Tensor, start: int) -> Tensor:
    """[n, vocab] logits of new tokens [n] after a prompt, in one pass without a cache."""
    out = model(torch.cat([prompt, new[:-1]])[None], gist_query_start=start, use_cache=False)
    return out.logits[0, len(prompt) - 1 :].float()


def prove_tokenizer(ours: RunTokenizer, directory: Path) -> None:
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


def files_of(directory: Path) -> list[Path]:
    """Every file of a directory and its folders."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def file_hashes(directory: Path, known: dict[str, dict]) -> dict[str, str]:
    """SHA-256 of every file of a directory; ``known``: those of weight files, as they were written."""
    result = {name: entry["sha256"] for name, entry in known.items()}
    for path in files_of(directory):
        name = path.relative_to(directory).as_posix()
        if name not in result and path.stat().st_size:
            result[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(sorted(result.items()))
