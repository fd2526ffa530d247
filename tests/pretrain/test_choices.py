"""Chunk sizes that samples draw: the draw, micro-batches of several, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.supervised import add_links, make_linked_shard
from unfold.model.config import ChoiceConfig, GistConfig, ModelConfig
from unfold.model.transformer import build_model
from unfold.model.visibility import IGNORED, AddedLosses
from unfold.pretrain.config import parse_config
from unfold.pretrain.data.choices import drawn
from unfold.pretrain.data.samples import BatchBuilder, TokenSource
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.plan.hardware import Cluster, find_gpu
from unfold.pretrain.plan.make import Planner

SEED, R = 3, 160
CHOICES = (ChoiceConfig((8,)), ChoiceConfig((4, 2), 2.0), ChoiceConfig((3, 2, 2), 1.0))
RECALL = {"recall": "all", "route_loss": 1.0, "route_queries": 9}


def builder(tiny, gist, seed=SEED):
    tokenizer = load_tokenizer(tiny.tokenizer, 3)
    return BatchBuilder(TokenSource([str(tiny.train)], R, seed, tokenizer, "data.train"), gist, tokenizer, seed=seed)


def test_a_draw_is_a_pure_function_of_seed_and_number():
    gist = GistConfig((8,), choices=CHOICES, **RECALL)
    numbers = range(4000)
    first = [drawn(gist, SEED, n) for n in numbers]
    assert first[::-1] == [drawn(gist, SEED, n) for n in numbers[::-1]], "independent of what was asked before"
    assert first[:50] != [drawn(gist, SEED + 1, n) for n in numbers[:50]]
    counts = Counter(one.chunk_sizes for one in first)
    for choice in CHOICES:
        assert counts[choice.chunk_sizes] / 4000 == pytest.approx(choice.weight / 4, abs=0.03)
    assert all(one == gist.with_sizes(one.chunk_sizes) for one in first[:20]), "all but the sizes stays"
    plain = GistConfig((8,))
    assert drawn(plain, SEED, 0) is plain


def test_a_sample_is_that_of_a_run_with_its_sizes_alone(tiny):
    """Whole micro-batches, tokens and labels, and what recalls and is taken for the routing loss."""
    gist = GistConfig((8,), choices=CHOICES, **RECALL)
    mixed = builder(tiny, gist)
    for number in range(6):
        own = drawn(gist, SEED, number)
        got, want = mixed.build([number], gist), builder(tiny, own).build([number], own)
        assert torch.equal(got.ids, want.ids) and torch.equal(got.labels, want.labels), "padded to its own length too"
        assert torch.equal(got.layout.level, want.layout.level) and torch.equal(got.recall.flags, want.recall.flags)
        assert got.drawn == ("x".join(map(str, own.chunk_sizes)),) and want.drawn == ()
    asked = mixed.build([0])
    assert asked.drawn == () and int(asked.layout.level.max()) == 0, "validation has the default"


@pytest.mark.parametrize(
    "how",
    [
        {"recall": "none"},
        {"recall": "none", "own_group": True, "n_prev": 2},
        {"recall": "all"},
        {"recall": "all", "budget_ratio": 1, "share": "group"},
        {"recall": "all", "topk": 2},
        {"recall": "all", "unfold_share": 0.5},
        RECALL,
    ],
    ids=str,
)
def test_samples_of_one_micro_batch_compute_what_they_do_alone(tiny, how):
    """Losses and their gradient in fp64, by the sample's own levels and budget."""
    samples_compute_what_they_do_alone(builder(tiny, gist := GistConfig((8,), choices=CHOICES, **how)), gist)


@pytest.mark.parametrize("how", [{"recall": "suffix"}, {**RECALL, "recall": "suffix", "unfold_share": 0.5}], ids=str)
def test_linked_samples_of_one_micro_batch_do_too(tiny, tmp_path, how):
    """A suffix sees its parts' highest gists, whatever level other samples have."""
    make_linked_shard(add_links(tiny, tmp_path / "tokenizer"), tmp_path / "s")
    tokenizer, gist = load_tokenizer(tmp_path / "tokenizer", 3), GistConfig((8,), choices=CHOICES, links=2, **how)
    source = TokenSource([str(tmp_path / "s")], 256, SEED, tokenizer, "data.train")
    samples_compute_what_they_do_alone(BatchBuilder(source, gist, tokenizer, seed=SEED), gist)


def samples_compute_what_they_do_alone(data, gist):
    """One sample of each choice, in one micro-batch and each in its own."""
    numbers = [next(n for n in range(99) if drawn(gist, SEED, n).chunk_sizes == c.chunk_sizes) for c in CHOICES]
    config = ModelConfig(
        len(data.tokenizer.word_starts), hidden_size=16, layers=2, heads=4, kv_heads=2, ffn_size=24, init_std=0.3
    )
    model = build_model(config).double()

    def run(batch):
        """Loss of each sample; the gradient of all, of the routing loss too; what was read."""
        added, recall = AddedLosses(apart=tuple("abc"[: len(batch.ids)])), batch.recall and batch.recall.weighing(0.25)
        gradient = torch.autograd.grad(model(replace(batch, added=added, recall=recall)), list(model.parameters()))
        tokens = [int(added.sums[f"tokens.{name}"]) for name in added.apart]
        assert tokens == (batch.labels != IGNORED).sum(1).tolist()
        return [float(added.sums[f"loss.{name}"]) for name in added.apart], gradient, recall.read() if recall else torch.zeros(2)

    losses, gradient, read = run(data.build(numbers, gist))
    alone = [run(data.build([n], gist)) for n in numbers]
    assert losses == pytest.approx([one[0][0] for one in alone], rel=2e-6)  # a token's loss is kept in fp32
    torch.testing.assert_close(read.double(), sum(one[2] for one in alone).double(), rtol=1e-6, atol=0)
    for got, *want in zip(gradient, *(one[1] for one in alone), strict=True):
        torch.testing.assert_close(got, sum(want), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "gist,message",
    [
        ({"choices": [{"chunk_sizes": [8]}]}, "gist.chunk_sizes: [8, 4] is not among gist.choices ([8]); set it to one of them"),
        ({"chunk_sizes": 8, "choices": [{"chunk_sizes": 8}, {"chunk_sizes": [8]}]}, "chunk_sizes [8] stand there twice"),
        ({"choices": [{"chunk_sizes": []}]}, "gist.choices.0.chunk_sizes: empty"),
        ({"choices": [{"chunk_sizes": [8, 0]}]}, "gist.choices.0.chunk_sizes: [8, 0] has a size below 1"),
        ({"choices": [{"chunk_sizes": [8, 4], "weight": 0}]}, "gist.choices.0.weight: 0.0 is not above 0"),
        ({"choices": [{"sizes": [8, 4]}]}, "gist.choices.0.sizes: unknown key; did you mean gist.choices.0.chunk_sizes?"),
    ],
)
def test_what_cannot_be_drawn_is_named(gist, message):
    with pytest.raises(UserError) as error:
        parse_config({"data": {"train": "t", "tokenizer": "k"}, "gist": gist})
    assert message in str(error.value)


def test_a_plan_takes_the_costliest_choice():
    tree = {
        "data": {"train": "t", "tokenizer": "k", "raw_tokens": 512},
        "model": {"vocab_size": 512},
        "gist": {"chunk_sizes": [8], "choices": [{"chunk_sizes": [8]}, {"chunk_sizes": [4, 2]}, {"chunk_sizes": [16]}]},
        "train": {"global_batch": 8},
    }
    planner = Planner(Cluster(find_gpu("H100-80GB", None), 8, 8, 0.0, 5e10))
    plan = planner.plan(parse_config(tree))
    tree["gist"] = {"chunk_sizes": [4, 2]}
    alone = planner.plan(parse_config(tree))
    assert plan.costliest == (4, 2) and alone.costliest == ()
    assert (plan.memory, plan.flops, plan.traffic, plan.sample) == (alone.memory, alone.flops, alone.traffic, alone.sample)
