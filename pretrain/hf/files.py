"""What an exported directory holds besides weights: configuration, tokenizer, code, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.hf.keys import hf_config, model_family
from unfold.model.hf.remote import TOKENIZER_MAP, config_entries, remote_code_files, tokenizer_code
from unfold.model.kinds import describe_kinds
from unfold.pretrain.checkpoint.load import FoundRun
from unfold.pretrain.config import RunConfig
from unfold.pretrain.data.tokenizer import GENERATION_FILE, RunTokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.hf.directory import read_keys, write_json
from unfold.pretrain.hf.generation import eos_of, exported_generation
from unfold.pretrain.plan.work import count_parameters

# Of a tokenizer directory: what only this program reads, and what is written anew.
NOT_EXPORTED = ("tokenizer_info.json", "word_starts.npy", "tokenizer_config.json", GENERATION_FILE)


def write_configs(run: FoundRun, directory: Path, dtype: str) -> None:
    """config.json, generation_config.json, the tokenizer's files, and the code that runs gists where the model has them.

    dtype: 'float32', 'bfloat16' or 'float16'.
    """
    tokenizer, model, gist = run.tokenizer, run.config.model, run.config.gist
    write_model_keys(model, gist, tokenizer, directory, dtype)
    if model.attention == "gist":
        for name, text in remote_code_files().items():
            (directory / name).write_text(text)
    write_json(directory / GENERATION_FILE, exported_generation(tokenizer))
    write_tokenizer(tokenizer, directory)


def write_model_keys(model: ModelConfig, gist: GistConfig, tokenizer: RunTokenizer, directory: Path, dtype: str) -> None:
    """config.json. Raises UserError for a setting that exports cannot have."""
    keys = hf_config(model, dtype, tokenizer.bos_id, eos_of(tokenizer), tokenizer.pad_id)
    if model.attention == "gist":
        architecture, ids = model_family(model).architecture, tokenizer.gist_ids
        try:
            own = ids[: gist.deepest], tokenizer.reserved_ids, tokenizer.word_starts, tokenizer.link_ids[: gist.links]
            keys |= config_entries(architecture, gist, *own, layer_attention=model.layer_attention)
        except ValueError as error:
            raise UserError(str(error)) from None
    write_json(directory / "config.json", keys)


def write_tokenizer(tokenizer: RunTokenizer, directory: Path) -> None:
    """The tokenizer's files, beside config.json. Its configuration says what readers would else guess, each one differently."""
    shutil.copytree(tokenizer.directory, directory, ignore=shutil.ignore_patterns(*NOT_EXPORTED), dirs_exist_ok=True)
    keys = read_keys(tokenizer.directory, "tokenizer_config.json")
    defaults: dict = {"model_input_names": ["input_ids", "attention_mask"]}  # else transformers 4 adds token_type_ids
    begun = tokenizer.tokenizer().encode("a", add_special_tokens=True).ids[:1]
    if begun != [tokenizer.bos_id]:
        defaults["add_bos_token"] = False  # else llama.cpp begins every text of a sentencepiece model with one
    model = tokenizer.directory / "tokenizer.model"
    if model.exists():
        if not sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes()).normalizer_spec.add_dummy_prefix:
            defaults["add_prefix_space"] = False  # else llama.cpp puts a space before every text
    # Where a class of the model's family reads it, its own defaults would be appended to the vocabulary.
    defaults |= {f"{role}_token": None for role in ("bos", "eos", "pad", "unk")}
    write_json(directory / "tokenizer_config.json", defaults | keys)
    if not _reads_as_written(tokenizer, directory):
        write_json(directory / "tokenizer_config.json", defaults | keys | {"auto_map": TOKENIZER_MAP})
        for name, text in tokenizer_code().items():
            (directory / name).write_text(text)


def _reads_as_written(tokenizer: RunTokenizer, directory: Path) -> bool:
    """Whether transformers treats texts as tokenizer.json says; for some families it puts parts of its own in their place."""
    from transformers import AutoTokenizer

    theirs = json.loads(AutoTokenizer.from_pretrained(directory).backend_tokenizer.to_str())
    ours = json.loads(tokenizer.tokenizer().to_str())
    return all(theirs[part] == ours[part] for part in ("normalizer", "pre_tokenizer", "decoder"))


def write_model_card(run: FoundRun, directory: Path) -> None:
    """README.md with front matter: what the model is, how to load it, how it was trained."""
    config, manifest = run.config, run.manifest
    has_gists = config.model.attention == "gist"
    tags = ["unfold", *(["gist", "sparse-attention"] if has_gists else [])]
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]", "---"]
    how = f"gist attention, chunk sizes {_told_sizes(config.gist)}" if has_gists else "dense attention"
    trained = f"trained with {how} on {manifest.raw_tokens:,} raw tokens ({manifest.step:,} steps)"
    if not manifest.step:
        trained = f"set up for {how}, but not trained with it: the weights are as they were imported"
    architecture = model_family(config.model).architecture
    parameters = count_parameters(config.model).total
    text = [
        *front,
        f"# {config.monitor.name or 'A language model trained with unfold'}",
        "",
        f"{architecture}, {parameters / 1e6:,.1f} M parameters, {trained}.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)",
        f"model = AutoModelForCausalLM.from_pretrained(DIRECTORY)  # as a dense {architecture}",
        *(
            [
                "# with gists, as it was trained; runs the code in this directory",
                'how = {"trust_remote_code": True, "attn_implementation": "gist"}',
                "model = AutoModelForCausalLM.from_pretrained(DIRECTORY, **how)",
                *(
                    ["# with other chunk sizes that it was trained with:", f"# model.generate(.., gist_chunk_sizes={other})"]
                    if (other := _other_choice(config.gist))
                    else []
                ),
            ]
            if has_gists
            else []
        ),
        "```",
        "",
        *(["## Training", "", *_training_table(config, manifest), ""] if manifest.step else []),
        "`export_proof.json` says how closely transformers reproduced the training code's logits when this directory was made.",
    ]
    (directory / "README.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def _told_sizes(gist: GistConfig) -> str:
    """Chunk sizes in words, those that samples drew among included."""
    drawn = ", ".join(str(list(choice.chunk_sizes)) for choice in gist.choices)
    return f"{list(gist.chunk_sizes)}{f' by default, drawn among {drawn} in training' if drawn else ''}"


def _other_choice(gist: GistConfig) -> list[int]:
    """Chunk sizes that the model was trained with and that are not its default; none where there are no others."""
    return next((list(c.chunk_sizes) for c in gist.choices if c.chunk_sizes != gist.chunk_sizes), [])


def _told_optimizer(config: RunConfig, own: str) -> str:
    """own: what to say of learning rates of stages."""
    optimizer, rate = config.optimizer, config.schedule
    muon = f"Muon for the layers' matrices, learning rate {optimizer.muon_lr:g}; for the rest "
    return (
        f"{muon if optimizer.kind == 'muon' else ''}AdamW, learning rate {optimizer.lr:g}{own} ({rate.kind}, warm-up "
        f"{rate.warmup:g}), betas {optimizer.beta1:g} and {optimizer.beta2:g}, weight decay {optimizer.weight_decay:g}, "
        f"gradients clipped at {config.train.clip:g}"
    )


def _training_table(config: RunConfig, manifest) -> list[str]:
    train, gist = config.train, config.gist
    samples = f" of {train.global_batch} samples of {config.data.raw_tokens:,}"
    if manifest.stage:  # they were of several sizes
        samples = f", {manifest.samples:,} samples, in stage {manifest.stage['number']} of {config.data.raw_tokens:,}"
    own = " where a stage set none of its own" if manifest.stage else ""
    rows = {
        "Raw tokens": f"{manifest.raw_tokens:,} in {manifest.step:,} steps{samples}",
        "Precision": f"{config.precision}, fp32 master weights",
        "Optimizer": _told_optimizer(config, own),
        "Longest sequence": f"{config.model.max_position:,} raw tokens",
    }
    if config.model.attention == "gist":
        rows["Gists"] = (
            f"chunk sizes {_told_sizes(gist)} ({gist.ratio}x compression), sink {gist.sink}, n_prev {gist.n_prev}, "
            f"{'' if gist.word_aware else 'no chunk grows to where a word starts, '}"
            f"{'own group only, ' if gist.own_group else ''}recall {gist.recall}"
            f"{f' from layer {gist.recall_from} on' if gist.recall_from > 1 else ''}"
        )
    if config.model.layer_attention:
        rows["Layers"] = describe_kinds(config.model.layer_kinds)
    if train.init_from:
        rows["Began from"] = f"weights of `{Path(train.init_from).name}`"
    if manifest.recent_losses:
        recent = manifest.recent_losses[-16:]
        rows["Last training loss"] = f"{sum(recent) / len(recent):.4f} nats per token, mean of {len(recent)} steps"
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
