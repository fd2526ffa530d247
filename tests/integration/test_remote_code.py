"""Exports run inside transformers with gists: by the installed version here, by others in the long test."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration import remote_code
from tests.model.gist_exports import LLAMA, decoder, greedy, make_model, read, recomputed, text, write_export
from tests.versions import NEWEST, OLDEST, environment_of
from unfold.model.config import GistConfig
from unfold.model.gist import Recall, build_layout
from unfold.model.hf.gist_sequence import GistSettings
from unfold.model.visibility import IGNORED, MicroBatch

SIZES = {"llama": (8, 4), "llama-one": (8,), "llama-three": (4, 3, 2)}
RULES = {
    "forgetting": {"recall": "none"},
    "adaptive": {"recall": "suffix"},
    "top-2": {"recall": "suffix", "topk": 2},
    "top-2 by group": {"recall": "suffix", "topk": 2, "share": "group"},
    "everybody": {"recall": "all", "budget_ratio": 1},
    "own group": {"recall": "suffix", "own_group": True, "recall_from": 2},
    "unfold all": {"recall": "suffix", "topk": 1, "unfold_all": True},
}
# (rule, tokens after the closed context; None: a plain prompt). All of them: tests/model/test_modeling_gist.py.
COMBINATIONS = {
    "llama": [(rule, 9) for rule in RULES] + [("forgetting", None), ("top-2", None), ("everybody", None), ("own group", None)],
    "llama-one": [("forgetting", 9), ("top-2", None)],
    "llama-three": [("adaptive", 9), ("top-2 by group", None)],
}
EXACT = {"word_aware": False, "recall": "suffix", "topk": 2}  # of an export of its own, without a bitmap of word starts
FAMILIES = {
    "qwen2": dict(qkv_bias=True, tied_embeddings=False),
    "qwen3": dict(qk_norm=True),
    "mistral": dict(family="mistral", tied_embeddings=False),
    "smollm3": dict(nope_layers=(1,)),
}
# Versions that exports must run in beside the project's; those between take long.
VERSIONS = [OLDEST, NEWEST, *(pytest.param(version, marks=pytest.mark.long) for version in ("5.0.0", "5.9.0", "5.12.0"))]


def case(name, path, model, gist, changes, context):
    """Prompts of different lengths with our logits and greedy continuations of them."""
    gist = dataclasses.replace(gist, **changes)
    prompts = [text(length, seed) for seed, length in enumerate((75, 41, 100, 4))]
    starts = None if context is None else [max(0, len(p) - context) for p in prompts]
    ours = decoder(model, gist, grow=context is None)
    sequences = [read(ours, p, s) for p, s in zip(prompts, starts or [None] * len(prompts))]
    logits = [recomputed(ours, sequence) for sequence in sequences]
    tokens = [greedy(ours, sequence) for sequence in sequences]
    unset = {field.name: field.default for field in dataclasses.fields(GistSettings) if field.default is not dataclasses.MISSING}
    return dict(name=name, model=path, gist=unset | changes, prompts=prompts, starts=starts, logits=logits, tokens=tokens)


def training_loss(model, gist) -> dict:
    """The mean loss of two sequences with closed contexts, as a training step computes it."""
    prompts, starts = [text(60, 3), text(45, 4)], [40, 30]
    total, targets = 0.0, 0
    for prompt, start in zip(prompts, starts):
        sequence = read(decoder(model, gist, grow=False), prompt, start)
        level = torch.tensor([sequence.level])
        layout = build_layout(level, torch.zeros_like(level), gist)
        recall = Recall.of(layout, gist, torch.tensor([sequence.recalls]))
        labels = torch.full_like(level, IGNORED)
        raw = (level[0] < 0).nonzero()[:, 0]
        labels[0, raw[:-1]] = torch.tensor(prompt[1:])
        with torch.no_grad():
            total += float(model(MicroBatch(torch.tensor([sequence.ids]), labels, layout, recall)))
        targets += len(prompt) - 1
    return dict(prompts=prompts, starts=starts, loss=total / targets)


@pytest.fixture(scope="module")
def exports(build, tmp_path_factory):  # noqa: F811
    """Exported models, and what ours computes."""
    root, cases = tmp_path_factory.mktemp("remote"), []
    model = make_model(LLAMA, build)
    for name, sizes in SIZES.items():
        write_export(root / name, model, GistConfig(sizes))
        for rule, context in COMBINATIONS[name]:
            cases.append(case(f"{name} {rule} {context}", name, model, GistConfig(sizes), RULES[rule], context))
    exact = GistConfig((4, 2), word_aware=False)
    write_export(root / "exact", model, exact)
    cases += [case(f"exact {context}", "exact", model, exact, EXACT, context) for context in (9, None)]
    for name, options in FAMILIES.items():
        family = make_model(dataclasses.replace(LLAMA, **options), build)
        write_export(root / name, family, GistConfig((4, 2)))
        cases.append(case(name, name, family, GistConfig((4, 2)), RULES["top-2"], 9))
    torch.save(cases, root / "cases.pt")
    torch.save(training_loss(model, GistConfig((8, 4), recall="suffix", topk=2)), root / "loss.pt")
    return root


def test_logits_and_tokens_are_ours(exports):
    figures = remote_code.check_cases(exports)
    assert figures["greedy_tokens_equal"] == (sum(map(len, COMBINATIONS.values())) + len(FAMILIES) + 2) * 4 * 16


@pytest.mark.parametrize("check", remote_code.CHECKS, ids=lambda check: check.__name__)
def test_inside_transformers(exports, check):
    check(exports)


@pytest.mark.parametrize("version", VERSIONS)
def test_other_versions(exports, version, tmp_path):
    """The same checks by a process that finds another transformers first."""
    environment = environment_of(version)
    script = Path(remote_code.__file__)
    done = subprocess.run([sys.executable, script, exports], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert version in (NEWEST, figures["transformers"]) and figures["checks"] == 1 + len(remote_code.CHECKS)
    print(figures)


def test_every_family_has_a_class(exports):
    for name, expected in {"qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "smollm3": "SmolLM3"}.items():
        model = remote_code.load(exports / name)
        assert type(model).__name__ == f"Gist{expected}ForCausalLM"


def test_lora_and_trainer(exports, tmp_path):
    """PEFT attaches to the gist model, and transformers' Trainer lowers the loss of answers on closed contexts."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = remote_code.load(exports / "llama")
    model.config.gist.update(recall="suffix", topk=2)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    samples = []
    for seed in range(2):
        ids = torch.tensor(text(60, seed))
        labels = torch.where(torch.arange(60) < 50, -100, ids)
        samples.append(dict(input_ids=ids, labels=labels, gist_query_start=torch.tensor(40)))
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    loss = lambda: model(**batch).loss.item()
    before = loss()
    settings = TrainingArguments(
        tmp_path, max_steps=6, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model, settings, train_dataset=samples).train()
    assert loss() < before - 0.1
    assert all(not torch.equal(p, trained[name]) for name, p in model.named_parameters() if p.requires_grad)
    out = model.generate(batch["input_ids"], gist_query_start=40, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 63)
