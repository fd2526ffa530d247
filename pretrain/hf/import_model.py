"""``python -m pretrain import``: a Hugging Face directory as a checkpoint that training, generation and export read."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.hf.keys import model_config
from unfold.pretrain.checkpoint.manifest import MANIFEST, Manifest, checkpoint_name, sync_directory, write_atomically
from unfold.pretrain.config import RunConfig, parse_config
from unfold.pretrain.data.tokenizer import RunTokenizer, load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.hf.directory import new_directory, read_gists, read_keys
from unfold.pretrain.hf.generation import write_generation
from unfold.pretrain.hf.import_weights import WeightFiles, write_checkpoint_weights
from unfold.pretrain.hf.vocabulary import adopt_tokenizer, match_vocabulary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILE_BYTES = 5 * 10**9
RAW_TOKENS = 4096  # of a sample in the configuration that is written
HEAD = """# Continued pretraining of {source}, with gists. Only the shards are missing:
#   python -m data_prep tokenize --input CORPUS.. --tokenizer {output}/tokenizer --output data/train
#   python -m pretrain train --config {output}/config.yaml --run-dir runs/NAME --set data.train=[data/train]
# The rates are the paper's recipe; check the layout with `python -m pretrain plan --config {output}/config.yaml --gpus N`.
"""


def import_model(args: argparse.Namespace) -> Path:
    """Write the checkpoint, its tokenizer and a configuration to go on with.

    Raises:
        UserError: something of the source is missing, damaged or not supported; or the output exists.
    """
    say = lambda text: print(text, file=sys.stderr, flush=True)
    keys = read_keys(args.input)
    levels, gist = _gists(args, read_gists(args.input, keys))
    try:
        model = model_config(keys)
    except ValueError as error:
        raise UserError(f"{args.input}/config.json: {error}") from None
    weights = WeightFiles(args.input)
    weights.check(model, model.vocab_size)
    with new_directory(args.output) as partial:
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer, levels, "--tokenizer")
            shutil.copytree(args.tokenizer, partial / "tokenizer")
        else:
            adopt_tokenizer(args.input, partial / "tokenizer", levels, args.links)
            tokenizer = load_tokenizer(partial / "tokenizer", levels)
        if gist:
            _check_gist_ids(args.input, keys, gist, tokenizer)
        rows, notes = match_vocabulary(weights, tokenizer, args.gist_rows)
        write_generation(args.input, keys, tokenizer, partial / "tokenizer")
        for note in notes:
            say(note)
        kinds = _layer_kinds(args.input, keys, model, say) if gist else model.layer_attention
        attention = "gist" if gist else "dense"
        model = dataclasses.replace(model, vocab_size=rows.size, attention=attention, layer_attention=kinds)
        config = _configuration(model, gist, args.output)
        checkpoint = partial / "checkpoints" / checkpoint_name(0)
        checkpoint.mkdir(parents=True)
        files = write_checkpoint_weights(weights, model, rows, DTYPES.get(args.dtype), checkpoint, FILE_BYTES, say)
        write_atomically(checkpoint / MANIFEST, json.dumps(asdict(_manifest(_untrained(config), tokenizer, files)), indent=1))
        sync_directory(checkpoint)
        head = HEAD.format(source=args.input.name, output=args.output)
        (partial / "config.yaml").write_text(head + yaml.safe_dump(_chosen(config), sort_keys=False))
    return args.output


def _gists(args: argparse.Namespace, own: GistConfig | None) -> tuple[int, GistConfig | None]:
    """Gist ids wanted, and how the model folds (None: it is dense). own: what the source says of its gists."""
    try:
        sizes = tuple(int(size) for size in args.chunk_sizes.split(",")) if args.chunk_sizes else None
    except ValueError:
        raise UserError(f"--chunk-sizes {args.chunk_sizes}: expected numbers such as 8,4") from None
    if args.gist_levels is not None and args.gist_levels < 0:
        raise UserError(f"--gist-levels {args.gist_levels}: is below 0")
    if args.links < 0:
        raise UserError(f"--links {args.links}: is below 0")
    fewest = len(sizes) if sizes else own.levels if own else 0
    levels = max(4, fewest) if args.gist_levels is None else args.gist_levels
    if sizes is None:
        if own and 0 < levels < own.levels:
            raise UserError(
                f"--gist-levels {levels}: {args.input} has gists of {own.levels} levels, chunk sizes {_text(own)}; give "
                "--chunk-sizes as well"
            )
        sizes = own.chunk_sizes if own and levels else (8, 4)[:levels]
    if len(sizes) > levels:
        raise UserError(f"--chunk-sizes {args.chunk_sizes}: {len(sizes)} levels, but --gist-levels is {levels}")
    try:
        own = own or GistConfig()
        return levels, dataclasses.replace(own, chunk_sizes=sizes, links=args.links or own.links) if sizes else None
    except ValueError as error:
        raise UserError(f"--chunk-sizes {args.chunk_sizes}: {error}") from None


def _layer_kinds(source: Path, keys: dict, model: ModelConfig, say: Callable[[str], None]) -> tuple[str, ...]:
    """Kinds of layers of a model that is to have gists: what its export says, or its own with gist layers for the dense ones."""
    if keys.get("gist") is not None:
        kinds = tuple(keys["gist"].get("layer_attention") or ())
        try:
            return dataclasses.replace(model, attention="gist", layer_attention=kinds).layer_attention
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}/config.json: gist.{error}") from None
    kinds = tuple("gist" if kind == "dense" else kind for kind in model.layer_attention)
    windows = ", ".join(dict.fromkeys(kind for kind in kinds if kind != "gist"))
    if windows and "gist" not in kinds:
        say(f"every layer has a window ({windows}); all become gist layers, and model.layer_attention may keep it in some")
        return ()
    if windows:
        say(f"layers with full attention become gist layers; the others keep their window ({windows}), and see sinks (gist.sink)")
    return kinds


def _text(gist: GistConfig) -> str:
    return ",".join(map(str, gist.chunk_sizes))


def _check_gist_ids(source: Path, keys: dict, gist: GistConfig, tokenizer: RunTokenizer) -> None:
    """The ids that an export folds with are those that its tokenizer's tokens have."""
    said = (keys.get("gist") or {}).get("token_ids")
    count = min(len(said), gist.levels) if isinstance(said, list) else 0
    if count and said[:count] != list(tokenizer.gist_ids[:count]):
        raise UserError(
            f"{source}/config.json: gist.token_ids is {said}, but the tokenizer's gists are {list(tokenizer.gist_ids)}; "
            "they belong to different models"
        )


def _configuration(model: ModelConfig, gist: GistConfig | None, output: Path) -> RunConfig:
    """A whole run's configuration, with the paper's recipe of continued pretraining and no shards yet."""
    plain = lambda x: [plain(v) for v in x] if isinstance(x, tuple) else x
    shape = dataclasses.asdict(model, dict_factory=lambda items: {k: plain(v) for k, v in items})
    tree = {
        "precision": "bf16",
        "model": shape,
        **({"gist": dataclasses.asdict(gist, dict_factory=lambda items: {k: plain(v) for k, v in items})} if gist else {}),
        "data": {
            "train": ["data/train"],
            "tokenizer": str(output / "tokenizer"),
            "raw_tokens": min(RAW_TOKENS, model.max_position),
        },
        "train": {"global_batch": 8, "init_from": str(output)},
        "optimizer": {"lr": 1e-5, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup": 0.05},
        "parallel": {"zero": 2},
    }
    return parse_config(tree, "the imported configuration")


def _chosen(config: RunConfig) -> dict:
    """The settings of a configuration that are not defaults, and those that say what the model is."""
    told = {"gist.chunk_sizes"} if config.model.attention == "gist" else set()
    told |= {f"model.{field.name}" for field in dataclasses.fields(ModelConfig)}
    tree, defaults = config.to_dict(), parse_config({"data": {"train": ["x"], "tokenizer": "x"}}).to_dict()
    result = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            result[section] = values
        elif chosen := {k: v for k, v in values.items() if f"{section}.{k}" in told or v != defaults[section][k]}:
            result[section] = chosen
    return result


def _untrained(config: RunConfig) -> RunConfig:
    """The same without where it begins from: what the checkpoint itself was made with."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=""))


def _manifest(config: RunConfig, tokenizer: RunTokenizer, files: dict[str, dict]) -> Manifest:
    names = ("torch", "transformers", "safetensors")
    return Manifest(
        step=0,
        samples=0,
        next_sample=0,
        raw_tokens=0,
        config=config.to_dict(),
        tokenizer_hash=tokenizer.hash,
        data=[],
        versions={name: importlib.metadata.version(name) for name in names},
        world=1,
        skipped=[],
        recent_losses=[],
        quarantine=[],
        files=files,
    )
