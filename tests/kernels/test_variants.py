"""A kernel is compiled once, not anew for every size of a micro-batch: a compilation in mid-run costs seconds on every rank.

Launches are recorded in the interpreter; what Triton would specialise them on is asked of Triton itself, so no GPU is needed.
"""

import importlib.util
import inspect
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import interpreter, jit

from tests.kernels.interpreter import compute_like_a_gpu, in_the_interpreter
from tests.kernels.route_cases import first_raw_rows
from unfold.kernels.compressed import compressed_attention
from unfold.kernels.route import Routed, routing_loss
from unfold.kernels.select import SelectRule
from unfold.kernels.unfold import recall_attention
from unfold.model.gist import GistConfig, build_layout, build_recall, interleave

# Programs that are several on purpose: levels at the top, between and at the bottom; segments with tiles of their own.
SEVERAL = {"score_kernel": 2, "take_kernel": 2, "d_key_kernel": 4, "sum_parts_kernel": 4}
BUCKETS = 4  # of scores that the search of a bound holds, powers of two


class Record:
    """Notes every launch and runs none: no size depends on what a kernel writes."""

    def __init__(self):
        self.variants = defaultdict(set)
        self.binders = {}

    def run(self, function, *args, grid, warmup, **kwargs):
        name = function.fn.__name__
        if function.fn not in self.binders:
            kernel = jit.JITFunction(function.fn, **{k: v for k, v in function.kwargs.items() if k.startswith("do_not")})
            backend = CUDABackend(GPUTarget("cuda", 90, 32))
            self.binders[function.fn] = jit.create_function_from_signature(inspect.signature(function.fn), kernel.params, backend)
        options = {k: v for k, v in kwargs.items() if k not in function.arg_names}
        own = {k: v for k, v in kwargs.items() if k in function.arg_names}
        _, specialization, _ = self.binders[function.fn](*args, **own)
        sizes = [s for s in specialization if s[0] == "constexpr"]
        self.variants[name, str(sizes), str(options)].add(str(specialization))


def micro_batch(rng: np.random.Generator, samples: int):
    """Random documents of random lengths, of which a random part recalls: q, k, v, layout and tree."""
    config = GistConfig((4, 2), recall="all")
    made = []
    for _ in range(samples):
        lengths = rng.integers(1, 40, rng.integers(1, 4)).tolist()
        word_starts = rng.random(20) < 0.7
        made.append(interleave(rng.integers(0, 20, sum(lengths)), lengths, word_starts, config, [20, 21]))
    length = max(len(m.ids) for m in made) + int(rng.integers(0, 5))
    level, doc = torch.full((2, samples, length), -1)
    for i, m in enumerate(made):
        level[i, : len(m.level)], doc[i, : len(m.doc)] = torch.from_numpy(m.level), torch.from_numpy(m.doc)
    layout = build_layout(level, doc, config)
    recalls = torch.from_numpy(rng.random((samples, length)) < rng.random())
    recalls[:, 0] = True  # at least one
    tree = build_recall(layout, config, recalls)
    shapes = [(samples, length, heads, 64) for heads in (2, 1, 1)]
    return [torch.from_numpy(rng.standard_normal(s, dtype=np.float32)).requires_grad_() for s in shapes], layout, tree


def variants(count: int, monkeypatch) -> dict:
    compute_like_a_gpu(monkeypatch)
    record = Record()
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda f, *a, **k: record.run(f, *a, **k))
    rng = np.random.default_rng(0)
    for i in range(count):
        qkv, layout, tree = micro_batch(rng, 1 + i % 2)
        out = compressed_attention(*qkv, layout.intervals, backend="triton")
        torch.autograd.grad(out, qkv, torch.ones_like(out))
        out, _ = recall_attention(*qkv, tree, SelectRule(4, 4), backend="triton")
        torch.autograd.grad(out, qkv, torch.ones_like(out))
        queries = qkv[0].detach().flatten(0, 1)[tree.tokens]
        loss = routing_loss(queries, qkv[1], Routed(tree, first_raw_rows(layout, tree.tokens)), backend="triton")
        torch.autograd.grad(loss, qkv[1])
    return record.variants


@in_the_interpreter
@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.long)])
def test_every_kernel_is_compiled_once(count, monkeypatch):
    found = variants(count, monkeypatch)
    programs = Counter(name for name, *_ in found)
    assert len(programs) == 23  # all but those that add up what is cut, in longer sequences
    assert programs.pop("bound_kernel") <= 2 * BUCKETS
    assert all(number <= SEVERAL.get(name, 1) for name, number in programs.items()), programs
    many = {key: sorted(specializations) for key, specializations in found.items() if len(specializations) > 1}
    assert not many, many
