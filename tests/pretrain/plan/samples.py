"""What tests of plans share: small models, and samples as plans take them to be."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.conftest import ROOT
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.gist import build_layout, interleave
from unfold.model.layers import BuildContext
from unfold.model.recompute import Copies, Offload, Recompute
from unfold.model.transformer import Transformer
from unfold.model.visibility import IGNORED, MicroBatch
from unfold.pretrain.config import RunConfig, parse_config
from unfold.pretrain.plan.fused import COUNTED

CONFIGS = ROOT / "launch" / "configs"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 0.02  # of every formula that is compared with a measurement; "about 10 %" would hide a forgotten term
SHAPES = {
    "wide heads": ModelConfig(256, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn_size=96),
    "many layers": ModelConfig(384, hidden_size=48, layers=4, heads=6, kv_heads=6, ffn_size=200, tied_embeddings=False),
    "kernel": ModelConfig(128, hidden_size=64, layers=1, heads=2, kv_heads=1, head_dim=64, ffn_size=64),
    "biases": ModelConfig(128, hidden_size=96, layers=3, heads=6, kv_heads=2, ffn_size=64, qkv_bias=True),
    "head norms": ModelConfig(128, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn_size=96, qk_norm=True),
    "all biases": ModelConfig(
        128, hidden_size=64, layers=3, heads=4, kv_heads=2, ffn_size=96, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
}


def configuration(model: ModelConfig, precision="fp32", raw=195, **train) -> RunConfig:
    """raw: three sinks and whole groups, so that the sample is as long as it can get and nothing is padded."""
    plain = parse_config({"data": {"train": ["x"], "tokenizer": "t"}, "precision": precision})
    model, data = replace(model, max_position=max(model.max_position, raw)), replace(plain.data, raw_tokens=raw)
    return replace(plain, model=model, data=data, gist=GistConfig((4, 2)), train=replace(plain.train, **train))


def micro_batch(config: RunConfig, samples: int) -> MicroBatch:
    """Samples of one document each, in which every token starts a word, as plans assume."""
    vocabulary, gist, raw = config.model.vocab_size, config.gist, config.data.raw_tokens
    ids = np.random.default_rng(0).integers(0, vocabulary - gist.levels, raw)
    level, doc = np.full(raw, -1), np.zeros(raw, np.int64)
    if config.model.attention == "gist":
        starts = np.ones(vocabulary, bool)
        made = interleave(ids, [raw], starts, gist, range(vocabulary - gist.levels, vocabulary))
        ids, level, doc = made.ids, made.level, made.doc
    else:
        gist = GistConfig((raw,))
    ids, level, doc = (torch.from_numpy(x)[None].repeat(samples, 1) for x in (ids, level, doc))
    return MicroBatch(ids, torch.where(level < 0, ids, IGNORED), build_layout(level, doc, gist))


def header_command(path: Path) -> list[str]:
    """The command that a configuration's comment gives."""
    return re.search(r"python -m pretrain (plan .*)", path.read_text())[1].split()


def built(config: RunConfig, copies: Copies | None = None) -> Transformer:
    """A model of a configuration, on the CPU. copies: how activations get to host memory."""
    train = config.train
    offload = Offload(copies) if train.offload_activations else None
    recompute = Recompute(train.activation_checkpointing, offload, train.mlp_tiles)
    build = replace(BuildContext.alone(), recompute=recompute)
    model = Transformer(config.model, replace(build, pointwise=COUNTED) if train.fuse_pointwise else build)
    return model.to(DTYPES[config.precision])


def saved_bytes(model: Transformer, batch: MicroBatch) -> int:
    """What autograd keeps of a forward pass, every storage once, parameters not."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(batch)
    return sum(storage.nbytes() for storage in kept.values())
