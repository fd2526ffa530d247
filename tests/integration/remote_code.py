"""Checks of exported gist models that need transformers and torch alone: run under other versions of transformers, too.

``python remote_code.py DIR`` runs them all on what :mod:`tests.integration.test_remote_code` wrote to DIR and prints figures.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

TOLERANCE = 1e-5  # fp32 logits


def load(directory: Path, gist: bool = True, **kwargs):
    how = dict(trust_remote_code=True, attn_implementation="gist") if gist else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **how, **kwargs)


def padded(prompts: list, left: bool, pad: int) -> dict:
    """A batch of prompts of different lengths."""
    width = max(map(len, prompts))
    fill = lambda p, x: [x] * (width - len(p)) + p if left else p + [x] * (width - len(p))
    ids = torch.tensor([fill(p, pad) for p in prompts])
    return dict(input_ids=ids, attention_mask=torch.tensor([[int(x != pad) for x in row] for row in ids.tolist()]))


def expected(directory: Path):
    """(name, model, changes of the gist entry, prompts, gist_query_start, logits, tokens) of every case."""
    for case in torch.load(directory / "cases.pt"):
        yield tuple(case[key] for key in ("name", "model", "gist", "prompts", "starts", "logits", "tokens"))


def check_cases(directory: Path) -> dict:
    """Logits of prompts, alone and padded on either side, and the greedy continuation are those of the training model."""
    worst, tokens_equal = 0.0, 0
    models: dict[str, torch.nn.Module] = {}
    for name, name_of_model, gist, prompts, starts, logits, tokens in expected(directory):
        if name_of_model not in models:
            models[name_of_model] = load(directory / name_of_model).eval()
        model = models[name_of_model]
        model.config.gist.update(gist)
        where = {} if starts is None else {"gist_query_start": torch.tensor(starts)}
        first = {} if starts is None else {"gist_query_start": starts[0]}
        pad = model.generation_config.pad_token_id
        with torch.no_grad():
            got = [model(torch.tensor([prompts[0]]), **first).logits[0]]
            for left in (True, False):
                batch = padded(prompts, left, pad)
                out = model(**batch, **where).logits
                got += [row[mask > 0] for row, mask in zip(out, batch["attention_mask"])]
        for ours, theirs in zip([logits[0], *logits, *logits], got):
            difference = float((ours - theirs).abs().max())
            assert difference <= TOLERANCE, f"{name}: logits differ by {difference:.1e}"
            worst = max(worst, difference)
        batch = padded(prompts, True, pad)
        out = model.generate(**batch, **where, max_new_tokens=len(tokens[0]), do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :].tolist()
        assert new == tokens, f"{name}: continued with {new}, expected {tokens}"
        tokens_equal += sum(map(len, new))
    return {"largest_logit_difference": worst, "greedy_tokens_equal": tokens_equal}


def check_plain_loading(directory: Path) -> None:
    """Without trust in remote code it is the stock class, dense; with it and no attn_implementation it is dense too."""
    path = directory / "llama"
    plain, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert type(plain).__name__ == "LlamaForCausalLM" and not any(info.values())
    ids = torch.tensor([list(range(40))])
    trusted, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert type(trusted).__name__ == "GistLlamaForCausalLM" and not any(info.values())
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, trusted(ids).logits)
        assert (plain(ids).logits - load(path)(ids).logits).abs().max() > 0.1, "gists change what is computed"


def check_beams(directory: Path) -> None:
    """Beams share and reorder the cache; without a cache every step reads the whole text anew."""
    model = load(directory / "llama").eval()
    model.config.gist.update(recall="suffix", topk=2)
    batch = padded([list(range(50)), list(range(20, 55))], True, model.generation_config.pad_token_id)
    how = dict(max_new_tokens=12, num_beams=4, do_sample=False, gist_query_start=torch.tensor([40, 25]))
    for grow in (False, True):
        cached = model.generate(**batch, **how, gist_grow=grow, num_return_sequences=2)
        assert torch.equal(cached, model.generate(**batch, **how, gist_grow=grow, num_return_sequences=2, use_cache=False))
    sampled = model.generate(**batch, **{**how, "do_sample": True, "temperature": 5.0, "num_beams": 1})
    reserved = model.config.gist["reserved_ids"]
    assert not set(reserved) & set(sampled[:, batch["input_ids"].shape[1] :].flatten().tolist())


def check_turns(directory: Path) -> None:
    """A cache goes on in the next call, and gives what reading everything in one call gives."""
    model = load(directory / "llama").eval()
    model.config.gist.update(recall="suffix", topk=2)
    ids = torch.tensor([list(range(40))])
    how = dict(max_new_tokens=9, do_sample=False, gist_query_start=30, return_dict_in_generate=True)
    first = model.generate(ids, **how)
    name = "cache" if "cache" in first else "past_key_values"  # renamed in transformers 5.24
    assert first[name].get_seq_length() == first.sequences.shape[1] - 1
    longer = torch.cat([first.sequences, ids[:, 5:12]], 1)
    second = model.generate(longer, **{name: first[name]}, **how).sequences
    assert torch.equal(second, model.generate(longer, **how).sequences)
    with torch.no_grad():  # both names, whatever this version calls it
        caches = [model(ids, gist_query_start=30, use_cache=True)[name] for _ in range(2)]
        new = [model(ids[:, :3], **{k: c}).logits for k, c in zip(("cache", "past_key_values"), caches)]
    assert torch.equal(*new)


def check_text(directory: Path) -> None:
    """The pipeline, a streamer and stop strings, with and without gists."""
    path = directory / "llama"
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = "Fellow citizens, whoever reads this."
    for gist in (True, False):
        model = load(path, gist).eval()
        ids = tokenizer(prompt, return_tensors="pt")  # as every model card writes it: generate() takes all that it returns
        out = model.generate(**ids, max_new_tokens=10, do_sample=False)
        text = tokenizer.decode(out[0])
        assert text.startswith(prompt) and len(text) == len(prompt) + 10 and "<gist" not in text
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            model.generate(**ids, max_new_tokens=10, do_sample=False, streamer=TextStreamer(tokenizer))
        assert printed.getvalue() == text + "\n"
        stop = text[len(prompt) + 3 : len(prompt) + 5]
        stopped = model.generate(**ids, max_new_tokens=10, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
        assert tokenizer.decode(stopped[0]) == text[: text.index(stop, len(prompt) - 1) + 2]
        options = dict(trust_remote_code=True, model_kwargs={"attn_implementation": "gist"}) if gist else {}
        pipe = pipeline("text-generation", model=str(path), dtype=torch.float32, device="cpu", **options)
        assert type(pipe.model).__name__ == ("GistLlamaForCausalLM" if gist else "LlamaForCausalLM")
        assert pipe(prompt, max_new_tokens=10, do_sample=False)[0]["generated_text"] == text


def check_gradients(directory: Path) -> None:
    """The loss is that of training, and gradient checkpointing gives the same gradients."""
    model = load(directory / "llama").train()
    model.config.gist.update(recall="suffix", topk=2)
    data = torch.load(directory / "loss.pt")
    batch = padded(data["prompts"], False, model.generation_config.pad_token_id)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(**batch, labels=labels, gist_query_start=torch.tensor(data["starts"]), use_cache=False).loss
        assert abs(loss.item() - data["loss"]) < 1e-5
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    rows = model.get_input_embeddings().weight.grad[model.config.gist["token_ids"]]
    assert rows.abs().sum(1).min() > 0, "every gist row learns"


def check_saved_again(directory: Path) -> None:
    """A gist model that is saved brings its code along and keeps the stock architecture's name; it loads in both ways."""
    model, ids = load(directory / "llama").eval(), torch.tensor([list(range(40))])
    target = directory / f"saved-{transformers.__version__}"
    model.save_pretrained(target)
    keys = json.loads((target / "config.json").read_text())
    assert keys["architectures"] == model.config.architectures == ["LlamaForCausalLM"]
    assert keys["auto_map"] == {"AutoModelForCausalLM": "modeling_gist.GistLlamaForCausalLM"}
    assert {p.name for p in target.glob("*.py")} == {p.name for p in (directory / "llama").glob("*.py")}
    again, dense = load(target).eval(), load(target, gist=False).eval()
    assert type(again).__name__ == "GistLlamaForCausalLM" and type(dense).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(dense(ids).logits, load(directory / "llama", gist=False).eval()(ids).logits)
    again.save_pretrained(target)  # over itself, as a second epoch does
    assert torch.equal(load(target).lm_head.weight, model.lm_head.weight)


CHECKS = (check_plain_loading, check_beams, check_turns, check_text, check_gradients, check_saved_again)


def main(directory: Path) -> None:
    figures = check_cases(directory)
    for check in CHECKS:
        check(directory)
    print(json.dumps({"transformers": transformers.__version__, "checks": 1 + len(CHECKS), **figures}))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main(Path(sys.argv[1]))
