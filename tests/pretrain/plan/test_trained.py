"""What a plan says of runs that train a part of a model, keep averages, or learn from dense attention or at several ratios."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.pretrain.plan.samples import CONFIGS, DTYPES, SHAPES, TOLERANCE, configuration, micro_batch, saved_bytes
from unfold.model.config import GistConfig, LoraConfig
from unfold.model.recompute import Recompute
from unfold.model.transformer import Transformer
from unfold.pretrain.config import RunConfig, load_config
from unfold.pretrain.plan.activations import Activations
from unfold.pretrain.plan.hardware import Cluster, find_gpu
from unfold.pretrain.plan.make import Plan, Planner
from unfold.pretrain.plan.memory import model_states
from unfold.pretrain.plan.roofline import product_flops
from unfold.pretrain.plan.trained import count_trained
from unfold.pretrain.plan.work import measure_sample
from unfold.pretrain.train.trainable import freeze

LORA = {"lora": LoraConfig(rank=4)}
WAYS = {
    "adapters": (LORA, ()),
    "some adapters, gists, norms": ({"lora": LoraConfig(rank=3, targets=("q_proj", "v_proj", "down_proj"))}, ("gists", "*norm*")),
    "gists": ({}, ("gists",)),
    "gists and norms": ({}, ("gists", "*norm*")),
    "all but the vocabulary": ({}, ("!embedding.*", "!head.*")),
    "upper layers": ({}, ("layers.2.*", "layers.3.*", "final_norm.weight")),
}


def learning(way: str, precision: str = "fp32", checkpointing: str = "none", tiles: int = 1) -> RunConfig:
    parts, trainable = WAYS[way]
    shape = replace(SHAPES["many layers"], vocab_size=256)
    plain = configuration(shape, precision, trainable=trainable, activation_checkpointing=checkpointing, mlp_tiles=tiles)
    return replace(plain, gist=GistConfig((4, 2), links=0), **parts)


# Of layers that backward does not reach nothing is kept; hooks see their checkpoints all the same, and the first layer that it
# reaches keeps less of its first norm, which is much of a model of four layers.
CASES = [
    (way, precision, checkpointing, tiles)
    for way in WAYS
    for precision in DTYPES
    for checkpointing, tiles in (("none", 1), ("selective", 4))
    if way != "upper layers" or (precision, tiles) == ("fp32", 1)
]


@pytest.mark.parametrize("way,precision,checkpointing,tiles", CASES)
def test_what_is_frozen_keeps_less(build, way, precision, checkpointing, tiles):
    """Parameters, what is trained of them, and what autograd keeps for backward."""
    config = learning(way, precision, checkpointing, tiles)
    lora = config.lora if config.lora.rank else None
    trained = count_trained(config)
    rows = tuple(range(254, 256)) if trained.rows else ()
    recompute = Recompute(checkpointing, mlp_tiles=tiles)
    model = Transformer(config.model, replace(build, recompute=recompute, rows=rows, lora=lora)).to(DTYPES[precision])
    freeze(model, config)
    assert trained.held == sum(p.numel() for p in model.parameters())
    assert trained.learning == sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = Activations.of(config, measure_sample(config), gpu=False)
    per_layer = kept.layer() if checkpointing == "none" else kept.selective()
    expected = config.model.layers * trained.reached * per_layer + kept.shared() + kept.norm() + kept.loss()
    # Checkpointed layers hold the rotary factors as an argument, and nobody keeps ids for an embedding that is not trained.
    unseen = 4 * config.model.head_dim * kept.tokens if checkpointing != "none" else 0
    unseen += 0 if "embedding.weight" in trained.names else 8 * kept.tokens
    assert expected - unseen == pytest.approx(saved_bytes(model, micro_batch(config, 1)), rel=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_states_are_of_what_is_trained(way):
    """An average takes four bytes of each number that is trained, where its master weights lie."""
    config = learning(way, "bf16")
    trained = count_trained(config)
    averaged = replace(config, checkpoint=replace(config.checkpoint, average_decay=0.99))
    for zero in (1, 2, 3):
        split = replace(config.parallel, zero=zero)
        plain, kept = (model_states(replace(c, parallel=split), trained, 4) for c in (config, averaged))
        assert kept.optimizer - plain.optimizer == trained.learning
        assert (kept.weights, kept.gradients) == (plain.weights, plain.gradients)
        assert plain.optimizer == 3 * trained.learning and plain.weights == 2 * trained.held / (4 if zero == 3 else 1)
    split = replace(config.parallel, zero=2, offload="optimizer")
    hosted = model_states(replace(averaged, parallel=split), trained, 4)
    assert hosted.optimizer == 0 and hosted.host == 4 * trained.learning + trained.learning


def test_tensor_ranks_and_stages_have_their_part():
    """Two tensor ranks hold adapters as they hold weights; stages add up to the model."""
    config = learning("adapters")
    config = replace(config, model=replace(config.model, kv_heads=6, heads=6))
    whole = count_trained(config)
    stages = [count_trained(replace(config, parallel=replace(config.parallel, pipeline=2)), s) for s in range(2)]
    assert sum(s.held for s in stages) == whole.held and sum(s.learning for s in stages) == whole.learning
    halves = count_trained(replace(config, parallel=replace(config.parallel, tensor=2)))
    hidden, ffn, rank = 48, 200, 4
    # Beside column layers (qkv, gate and up) the first matrix is whole, beside row layers (output, down) the second one.
    alike = 4 * (5 * rank * hidden + 2 * rank * hidden)
    assert halves.learning == (whole.learning - alike) / 2 + alike and ffn


def planned(*overrides: str) -> Plan:
    path = CONFIGS / "paper" / "llama-3.2-1b.yaml"
    return Planner(Cluster(find_gpu("H100", None), 8, 8)).plan(load_config(path, overrides))


def test_training_less_costs_less():
    everything, adapters, gists = planned(), planned("lora.rank=16"), planned("train.trainable=[gists]")
    for less in (adapters, gists):
        for part in ("gradients", "optimizer", "activations"):
            assert getattr(less.fullest, part) < getattr(everything.fullest, part), part
        assert less.fullest.weights == pytest.approx(everything.fullest.weights, rel=0.02)
        assert sum(t.sent for t in less.traffic) < 0.1 * sum(t.sent for t in everything.traffic)
        assert less.time.products.seconds < 0.75 * everything.time.products.seconds
    averaged = planned("checkpoint.average_decay=0.999")
    assert averaged.fullest.optimizer == pytest.approx(everything.fullest.optimizer * 4 / 3)
    assert averaged.time.memory.seconds > everything.time.memory.seconds


def test_products_of_frozen_weights_are_two_of_three():
    config, frozen = learning("all but the vocabulary"), learning("gists")
    kept = [Activations.of(c, measure_sample(c)) for c in (config, frozen)]
    flops = [product_flops(c, k, 4)[0] for c, k in zip((config, frozen), kept)]
    head = 256 * 48 * kept[0].targets
    assert 3 * (flops[1] - 6 * head) == 2 * (flops[0] - 4 * head)


def test_the_teacher_is_one_more_pass():
    """Dense attention passes forward through all layers, beside the student, for the samples that learn from it."""
    plain, taught, half = planned(), planned("distill.hidden=1"), planned("distill.hidden=1", "distill.every=2")
    for part in ("products", "attention", "memory"):
        more = getattr(taught.time, part).seconds - getattr(plain.time, part).seconds
        assert more > 0 and getattr(half.time, part).seconds - getattr(plain.time, part).seconds == pytest.approx(more / 2)
    layers = 2 * plain.config.model.layers * 60_817_408 * plain.sample.length * 16  # matrices of a layer, samples of a rank
    assert (taught.time.products.seconds - plain.time.products.seconds) * 700e12 == pytest.approx(layers, rel=0.001)


def test_chunk_sizes_that_are_drawn():
    """Memory and time of the costliest, and the mean time by the weights of the choices."""
    choices = "gist.choices=[{chunk_sizes: [8], weight: 3}, {chunk_sizes: [8, 4]}]"
    both, costly, cheap = (
        planned(choices, "gist.chunk_sizes=[8]"),
        planned("gist.chunk_sizes=[8]"),
        planned("gist.chunk_sizes=[8, 4]"),
    )
    worst = max(costly.fullest.total, cheap.fullest.total)
    assert both.fullest.total == worst
    assert both.mean_seconds == pytest.approx((3 * costly.time.total + cheap.time.total) / 4)
    assert both.time.total == pytest.approx(max((costly, cheap), key=lambda p: p.flops.total).time.total)
    assert costly.mean_seconds is None
