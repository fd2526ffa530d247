"""Bytes that a plan says are kept for backward and alive at most, against what autograd saves and what lives."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.conftest import run
from tests.live_memory import LiveMemory
from tests.pretrain.plan.samples import DTYPES, SHAPES, TOLERANCE, built, configuration, micro_batch, saved_bytes
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.loss import Targets, token_loss_sum
from unfold.model.recompute import Copies, Recompute
from unfold.model.transformer import Transformer
from unfold.pretrain.plan.activations import Activations
from unfold.pretrain.plan.memory import layers_peak
from unfold.pretrain.plan.work import measure_sample

BATCH = 2


@pytest.mark.parametrize("checkpointing,tiles", [("none", 1), ("full", 1), ("selective", 1), ("none", 4), ("selective", 4)])
@pytest.mark.parametrize("precision,attention", [("fp32", "gist"), ("bf16", "gist"), ("fp32", "dense"), ("bf16", "dense")])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_those_that_autograd_saves(build, shape, precision, attention, checkpointing, tiles):
    shaped = replace(SHAPES[shape], attention=attention)
    config = configuration(shaped, precision, micro_batch=BATCH, activation_checkpointing=checkpointing, mlp_tiles=tiles)
    kept_by = replace(build, recompute=Recompute(checkpointing, mlp_tiles=tiles))
    model = Transformer(shaped, kept_by).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    kept = Activations.of(config, measure_sample(config), gpu=False)
    per_layer = {"none": kept.layer, "full": kept.residual, "selective": kept.selective}[checkpointing]()
    expected = shaped.layers * per_layer + kept.shared() + kept.norm() + kept.loss()
    # Checkpointed layers hold the rotary factors as an argument, which autograd does not see.
    unseen = 4 * shaped.head_dim * kept.tokens if checkpointing != "none" else 0
    assert expected - unseen == pytest.approx(saved_bytes(model, micro_batch(config, BATCH)), rel=TOLERANCE)


@pytest.mark.parametrize("samples", [1, BATCH])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("kinds", [("gist", "dense"), ("gist", "window:20")], ids=str)
def test_activations_of_layers_of_several_kinds(build, kinds, checkpointing, samples):
    model = replace(SHAPES["wide heads"], layer_attention=kinds)
    config = configuration(model, micro_batch=samples, activation_checkpointing=checkpointing)
    model = Transformer(model, replace(build, recompute=Recompute(checkpointing)))
    kept = Activations.of(config, measure_sample(config), gpu=False)
    per_layer = kept.layer() if checkpointing == "none" else kept.selective()
    expected = model.config.layers * per_layer + kept.shared() + kept.norm() + kept.loss()
    unseen = 4 * model.config.head_dim * kept.tokens if checkpointing != "none" else 0
    assert expected - unseen == pytest.approx(saved_bytes(model, micro_batch(config, samples)), rel=TOLERANCE)


@pytest.mark.parametrize("tiles", [4, 16])
@pytest.mark.parametrize("dtype,precision", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_a_tile_needs_what_the_plan_says(build, dtype, precision, tiles):
    """The most bytes that the tiled layer needs in backward beside its input, its output and the output's gradient."""
    model = replace(SHAPES["kernel"], ffn_size=256)
    config = configuration(model, precision, raw=4091, mlp_tiles=tiles)
    kept = Activations.of(config, measure_sample(config), gpu=False)
    layer = Transformer(model, replace(build, recompute=Recompute(mlp_tiles=tiles))).layers[0].mlp.to(dtype)
    x = torch.randn(kept.tokens, 1, model.hidden_size, dtype=dtype, requires_grad=True)
    with LiveMemory() as memory:
        out = layer(x)
        grad = torch.ones_like(out)
        before, memory.peak = memory.now, 0
        out.backward(grad)
    assert kept.tile() == pytest.approx(memory.peak - before, rel=0.03)


SAVED_BY_TRITON = """
import torch
from unfold.kernels.compressed import compressed_attention
from unfold.kernels.unfold import recall_attention
from unfold.model.gist.recall import build_recall, select_rule
from tests.pretrain.plan.samples import SHAPES, configuration, micro_batch
config = configuration(SHAPES["kernel"], raw=51)
layout = micro_batch(config, 2).layout
tree = build_recall(layout, config.gist, layout.text & (layout.position >= 31))
q, k, v = (torch.randn(2, layout.level.shape[1], heads, 64, requires_grad=True) for heads in (2, 1, 1))
for attention in (lambda: compressed_attention(q, k, v, layout.intervals, backend="triton"),
                  lambda: recall_attention(q, k, v, tree, select_rule(config.gist), backend="triton")):
    kept = {}
    def pack(x):
        if x is not tree.tokens:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention()
    print("BYTES", sum(storage.nbytes() for storage in kept.values()))
"""


def test_the_gpu_kernels_save_what_the_plan_says():
    """In Triton's interpreter, which needs a process of its own: forgetting, and where the last 20 tokens recall."""
    done = run(sys.executable, "-c", SAVED_BY_TRITON, env={**os.environ, "TRITON_INTERPRET": "1"})
    forgetting, recalling = map(int, re.findall(r"BYTES (\d+)", done.stdout))
    config = configuration(SHAPES["kernel"], raw=51, micro_batch=2)
    kept = Activations.of(config, measure_sample(config))
    copied = kept.element * 2 * 64 * kept.tokens  # the output once more, as the input of the projection after it
    assert kept.attention() - copied == pytest.approx(forgetting, rel=TOLERANCE)
    config = replace(config, model=replace(config.model, layers=2), gist=replace(config.gist, recall="suffix"))
    recalls = Activations.of(config, measure_sample(config, suffix=20 / 51).of_stage(1, 2))
    assert recalls.attention() - copied == pytest.approx(recalling, rel=TOLERANCE)


PEAK_OF_RECALL = """
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter
from unfold.kernels.unfold import recall_attention
from unfold.model.gist.recall import build_recall, select_rule
from tests.live_memory import LiveMemory
from tests.pretrain.plan.samples import SHAPES, configuration, micro_batch
plain = interpreter.InterpretedFunction.run
def run(*args, **kwargs):  # what the interpreter makes by itself is not the GPU's
    with _disable_current_modes():
        return plain(*args, **kwargs)
interpreter.InterpretedFunction.run = run
config = configuration(SHAPES["kernel"], raw=323)
layout = micro_batch(config, 1).layout
tree = build_recall(layout, config.gist, layout.text)
torch.manual_seed(0)
q, k, v = (torch.randn(1, layout.level.shape[1], heads, 64) for heads in (2, 1, 1))
k = torch.nn.functional.normalize(k, dim=-1)
leaves = [x.half().requires_grad_() for x in (q, k, v)]
recall_attention(*leaves, tree, select_rule(config.gist), backend="triton")  # tables that all layers share
with LiveMemory() as memory:
    out, _ = recall_attention(*leaves, tree, select_rule(config.gist), backend="triton")
    forward, memory.peak = memory.peak, 0
    torch.autograd.grad(out, leaves, torch.ones_like(out))
print("BYTES", forward, memory.peak)
"""


@pytest.mark.long
def test_a_recalling_layer_needs_what_the_plan_says():
    """The most bytes that its attention has in a backward pass, in Triton's interpreter."""
    done = run(sys.executable, "-c", PEAK_OF_RECALL, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=600)
    forward, backward = map(int, re.search(r"BYTES (\d+) (\d+)", done.stdout).groups())
    config = configuration(SHAPES["kernel"], "bf16", raw=323)  # as many bytes as fp16, which the interpreter computes with
    config = replace(config, model=replace(config.model, layers=2), gist=replace(config.gist, recall="all"))
    kept = Activations.of(config, measure_sample(config).of_stage(1, 2))
    # Queries are there before, as the layer's keys and values are; its output stands for the input of the projection after it.
    before = kept.attention() - kept.element * 2 * 64 * kept.tokens
    assert before < forward < before + kept.recalling()
    assert before + kept.recalling() == pytest.approx(backward, rel=0.03)


class Kernel(torch.autograd.Function):
    """Stands for the GPU's attention kernel: keeps what that keeps, makes the gradients that it makes, computes nothing."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        sorted_rows = (x.new_empty(x.shape[0], rows, *x.shape[2:]) for x in (k, v))
        statistics = [q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2 if q.dtype == torch.float32 else 1)]
        ctx.save_for_backward(q, *sorted_rows, out, *statistics)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *_ = ctx.saved_tensors
        return torch.zeros_like(q), *(x.new_zeros(q.shape[0], q.shape[1], *x.shape[2:]) for x in (k, v)), None


class HostMemory(Copies):
    """Host memory of a GPU that this CPU stands for: what lies there is not counted, and what comes back is a copy."""

    def to_host(self, x: Tensor) -> Tensor:
        with _disable_current_modes():
            return x.detach().clone()

    def bring(self, hosts: list[Tensor], device: torch.device) -> list[tuple[Tensor, None]]:
        return [(host.clone(), None) for host in hosts]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    "layers,checkpointing,offload,tiles",
    [(2, "none", False, 1), (3, "none", False, 4), (2, "full", False, 1), (3, "full", True, 4), (6, "full", True, 4),
     (3, "full", False, 16), (3, "full", True, 16), (2, "selective", False, 1), (3, "selective", True, 4),
     (3, "selective", True, 16), pytest.param(4, "full", True, 16, marks=pytest.mark.long),
     pytest.param(4, "selective", True, 4, marks=pytest.mark.long)],
)  # fmt: skip
def test_peaks_are_those_of_a_step(layers, checkpointing, offload, tiles, precision):
    """The most bytes that are alive in a forward and backward pass; with offload flat in layers. Four layers: 262,144 tokens."""
    model = ModelConfig(128, hidden_size=32, layers=layers, heads=2, kv_heads=1, head_dim=16, ffn_size=96)
    raw = 2**18 if layers == 4 else 2**12
    config = configuration(
        model, precision, raw, activation_checkpointing=checkpointing, offload_activations=offload, mlp_tiles=tiles
    )
    config = replace(config, gist=GistConfig((8, 8, 8)))
    sample, model = measure_sample(config), built(config, HostMemory())
    kept = Activations.of(config, sample)
    ids = torch.zeros(1, sample.length, dtype=torch.int64)
    labels = torch.where(torch.arange(sample.length) < sample.raw, 0, -100)[None]
    with LiveMemory() as memory:
        hidden = model.run_layers(ids, ids, lambda _, *qkv: Kernel.apply(*qkv, sample.key_rows))
        loss = token_loss_sum(hidden, Targets.of(labels), model.head_weight, model.build)
        del hidden
        loss.backward()
    on_gpu, working, on_host = layers_peak(config, kept, layers)
    assert (on_host > on_gpu) is offload
    assert on_gpu + kept.shared() + max(working, kept.loss_peak()) == pytest.approx(memory.peak, rel=0.03)
