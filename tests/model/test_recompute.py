"""Computing again in backward, tiles and host memory: the same losses and gradients, and only what was promised is kept."""

import gc
import weakref
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from tests.live_memory import LiveMemory
from tests.model.test_recall_model import VOCAB, micro_batch
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.gist import Recall
from unfold.model.recompute import Copies, Offload, Recompute
from unfold.model.transformer import Transformer

unfold_op = import_module("unfold.kernels.unfold.op")
GISTS = {"forget": GistConfig((4, 2)), "recall": GistConfig((4, 2), recall="all", topk=2)}
WAYS = {
    "full": Recompute("full"),
    "selective": Recompute("selective"),
    "full offload": Recompute("full", Offload()),
    "selective offload": Recompute("selective", Offload()),
    "tiles": Recompute(mlp_tiles=3),
    "more tiles than tokens": Recompute(mlp_tiles=10**6),
    "full tiles": Recompute("full", mlp_tiles=3),
    "selective offload tiles": Recompute("selective", Offload(), 4),
}


KEEP = Recompute()
BIASES = dict(qkv_bias=True, output_bias=True, mlp_bias=True)


def model_of(build, recompute=KEEP, dtype=torch.float32, layers=3, **shape) -> Transformer:
    config = ModelConfig(
        VOCAB, hidden_size=32, layers=layers, heads=4, kv_heads=2, ffn_size=48, init_std=0.2, **(shape or BIASES)
    )
    return Transformer(config, replace(build, recompute=recompute)).to(dtype)


def results(model: Transformer, batch) -> list[torch.Tensor]:
    """Loss, gradients, and what recall read in each layer."""
    loss = model(batch)
    loss.backward()
    stats = batch.recall.stats if batch.recall else {}
    read = [x for layer in sorted(stats) for x in (stats[layer].unfolded, stats[layer].selected)]
    return [loss.detach(), *(p.grad for p in model.parameters()), *read]


@pytest.mark.parametrize("attention,gist", [("gist", "forget"), ("gist", "recall"), ("dense", "forget")])
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_are_those_of_keeping_everything(build, way, attention, gist):
    """To the last bit but for tiles, whose weights' gradients are summed in another order."""
    batch = lambda: micro_batch(GISTS[gist])
    want = results(model_of(build, attention=attention, qk_norm=True), batch())
    got = results(model_of(build, WAYS[way], attention=attention, qk_norm=True), batch())
    for a, b in zip(got, want, strict=True):
        if "tiles" in way:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))
        else:
            assert torch.equal(a, b)


def test_tiles_are_no_less_exact_than_the_whole_in_bf16(build):
    """Against fp64: sums over tiles are made in fp32."""
    batch = micro_batch(GISTS["forget"], (700, 500))
    exact = results(model_of(build, dtype=torch.float64, layers=1), batch)
    errors = []
    for recompute in (KEEP, Recompute(mlp_tiles=32)):
        got = results(model_of(build, recompute, torch.bfloat16, layers=1), batch)
        errors.append(sum(float((a.double() - b).norm() / b.norm()) for a, b in zip(got[1:], exact[1:])))
    assert errors[1] <= 1.05 * errors[0]


@pytest.mark.parametrize("checkpointing,attended", [("full", 2), ("selective", 1)])
def test_attention_and_tiles_are_computed_as_often_as_promised(build, monkeypatch, checkpointing, attended):
    """full: attention twice; selective: once. Tiles are never computed for a checkpoint's sake alone."""
    model = model_of(build, Recompute(checkpointing, mlp_tiles=2), layers=2)
    noted, tiles, note = [], [], Recall.note
    monkeypatch.setattr(Recall, "note", lambda self, index, read: noted.append(index) or note(self, index, read))
    for layer in model.layers:
        product = layer.mlp.down.product
        monkeypatch.setattr(layer.mlp.down, "product", lambda *x, product=product: tiles.append(0) or product(*x))
    model(micro_batch(GISTS["recall"])).backward()
    assert noted == [1] * attended  # the first layer never recalls
    assert len(tiles) == 2 * 2 * 2  # layers, tiles, forward and backward


class NumpyCopies(Copies):
    """A host memory whose bytes are not counted, and which tells what passes."""

    def __init__(self):
        self.sent, self.brought, self.waits = 0, [], []

    def to_host(self, x):
        self.sent += x.nbytes
        return x.detach().numpy().copy()

    def bring(self, hosts, device):
        self.brought.append(len(hosts))
        return [(torch.from_numpy(host).clone(), len(self.brought)) for host in hosts]

    def wait(self, arrived):
        self.waits.append((arrived, len(self.brought)))


@pytest.mark.parametrize("recompute", [Recompute("full"), Recompute("selective"), Recompute("selective", mlp_tiles=4)])
def test_with_offload_nothing_of_a_layer_stays_on_the_device(build, recompute):
    """Bytes alive after forward, and at most in backward, are the same for two layers and for six."""
    after_forward, peaks, copies = [], [], [NumpyCopies(), NumpyCopies()]
    for layers, copied in zip((2, 6), copies):
        model = model_of(build, replace(recompute, offload=Offload(copied)), layers=layers)
        model.layers.requires_grad_(False)  # gradients of weights are no activations
        batch = micro_batch(GISTS["forget"])
        with LiveMemory() as memory:
            loss = model(batch)
            after_forward.append(memory.now)
            memory.peak = 0
            loss.backward()
        peaks.append(memory.peak)
    assert after_forward[0] == after_forward[1] and peaks[0] == peaks[1]
    assert copies[1].sent == 3 * copies[0].sent > 0


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_each_layer_comes_back_once_and_one_layer_ahead(build, checkpointing):
    copied = NumpyCopies()
    model = model_of(build, Recompute(checkpointing, Offload(copied)), layers=4)
    loss = model(micro_batch(GISTS["forget"]))
    loss.backward(retain_graph=True)
    assert len(copied.brought) == 4 and len(set(copied.brought)) == 1
    for layer in range(1, 4):  # waited for the layer-th to arrive: the next one was already on its way
        assert all(begun >= layer + 1 for arrived, begun in copied.waits if arrived == layer)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, once in zip(model.parameters(), first):
        torch.testing.assert_close(p.grad, 2 * once)


@pytest.mark.parametrize("checkpointing,kept", [("full", 0), ("selective", 2)])
def test_selection_lists_are_computed_again_or_kept_never_both(build, monkeypatch, checkpointing, kept):
    model = model_of(build, Recompute(checkpointing), layers=2)  # of which one recalls
    made, select = [], unfold_op.select_gists

    def selected(*args, **kwargs):
        selection = select(*args, **kwargs)
        made.extend(weakref.ref(rows) for rows in selection.rows)
        return selection

    monkeypatch.setattr(unfold_op, "select_gists", selected)
    loss = model(micro_batch(GISTS["recall"]))
    gc.collect()
    assert len(made) == 2 and sum(ref() is not None for ref in made) == kept
    loss.backward()
    assert len(made) == (2 if kept else 4)
