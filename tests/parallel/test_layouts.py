"""Every parallel layout gives the losses of one process, step by step: fp32 within 2e-6, gradient norms within 1e-5."""

from __future__ import annotations

import pytest

from tests.integration.runs import train

STEPS = "train.steps=10"

SELECTIVE, TILES = "train.activation_checkpointing=selective", "train.mlp_tiles=3"
FUSED = "train.fuse_pointwise=true"
HOST = "train.offload_activations=true"
NESTED = ["parallel.context=4", "parallel.context_heads=2"]

# name: (ranks, settings). All train the same global batch of packed documents with clipping.
LAYOUTS = {
    "micro_batch 4": (1, ["train.micro_batch=4"]),
    "activation checkpointing": (1, ["train.activation_checkpointing=full"]),
    "selective, tiles, host": (1, [SELECTIVE, TILES, HOST]),
    "fused": (1, [FUSED]),
    "dp2 zero3 fused tiles": (2, ["parallel.zero=3", TILES, FUSED]),
    "cp2 pp2 fused": (4, ["parallel.context=2", "parallel.pipeline=2", FUSED]),
    "tp2 sequence fused checkpointing": (2, ["parallel.tensor=2", "parallel.sequence=true", FUSED, SELECTIVE]),
    "dp2 zero1": (2, ["parallel.zero=1"]),
    "dp2 zero2 micro_batch 2": (2, ["parallel.zero=2", "train.micro_batch=2"]),
    "dp2 zero3": (2, ["parallel.zero=3"]),
    "dp2 zero2 offload": (2, ["parallel.zero=2", "parallel.offload=optimizer"]),
    "dp2 zero3 offload": (2, ["parallel.zero=3", "parallel.offload=all"]),
    "dp2 zero2 tiles": (2, ["parallel.zero=2", "train.micro_batch=2", TILES]),
    "dp2 zero3 selective tiles": (2, ["parallel.zero=3", SELECTIVE, TILES, HOST]),
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2 tiles": (2, ["parallel.tensor=2", TILES]),
    "tp2 sequence selective tiles": (2, ["parallel.tensor=2", "parallel.sequence=true", SELECTIVE, TILES]),
    "tp2 sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tp2 dp2 zero3": (4, ["parallel.tensor=2", "parallel.zero=3"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2 checkpointing": (2, ["parallel.pipeline=2", "train.activation_checkpointing=full"]),
    "pp2 selective host tiles": (2, ["parallel.pipeline=2", SELECTIVE, TILES, HOST]),
    "pp2 dp2 micro_batch 2": (4, ["parallel.pipeline=2", "train.micro_batch=2"]),
    "tp2 pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tp2 pp2 sequence": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "cp2": (2, ["parallel.context=2"]),
    "cp2 selective tiles": (2, ["parallel.context=2", SELECTIVE, TILES]),
    "cp2 tp2 sequence": (4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "cp2 dp2 zero2": (4, ["parallel.context=2", "parallel.zero=2"]),
    "cp2 pp2": (4, ["parallel.context=2", "parallel.pipeline=2"]),
    "ulysses2": (2, ["parallel.context=2", "parallel.context_method=ulysses"]),
    "ulysses2 pp2": (4, ["parallel.context=2", "parallel.context_method=ulysses", "parallel.pipeline=2"]),
    "cp2 ulysses2": (4, NESTED),
    "cp2 ulysses2 zero2 micro_batch 4": (4, [*NESTED, "parallel.zero=2", "train.micro_batch=4"]),
    "cp2 ulysses2 zero3 selective tiles": (4, [*NESTED, "parallel.zero=3", SELECTIVE, TILES]),
    "cp2 ulysses2 pp2": (8, [*NESTED, "parallel.pipeline=2"]),
}
# The rest runs with `make test-long`; each kind of parallelism is in the short list.
SHORT = ("dp2 zero2 micro_batch 2", "dp2 zero3 offload", "tp2 sequence selective tiles", "pp2 selective host tiles", "tp2 pp2",
         "cp2 pp2", "ulysses2", "cp2 ulysses2")  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return tiny.config(tmp_path_factory.mktemp("layouts") / "tiny.yaml")


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("alone") / "run", 1, STEPS)


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in LAYOUTS])
def test_a_layout_gives_the_losses_of_one_process(name, config, alone, tmp_path):
    ranks, settings = LAYOUTS[name]
    metrics = train(config, tmp_path / "run", ranks, STEPS, *settings)
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * max(1, want["loss"])
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        assert got.get("valid_loss") == pytest.approx(want.get("valid_loss"), abs=1e-5)
        assert (got["samples"], got["loss_tokens"]) == (want["samples"], want["loss_tokens"])


def test_a_pipeline_with_recall_and_untied_embeddings(tiny, tmp_path):
    """Recall is rebuilt on each stage; the head is a weight of its own."""
    config = tiny.config(tmp_path / "c.yaml", model={"tied_embeddings": False}, gist={"chunk_sizes": [4, 2], "recall": "all"})
    alone = train(config, tmp_path / "alone", 1, "train.steps=4")
    pipeline = train(config, tmp_path / "pipeline", 2, "train.steps=4", "parallel.pipeline=2")
    for got, want in zip(pipeline, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]


RECALL = [
    pytest.param("cp2", ["gist.own_group=true", "gist.n_prev=8"]),  # windows of 32 tokens, at a border in two ranks
    *(pytest.param(n, [], marks=pytest.mark.long) for n in ("cp2 tp2 sequence", "cp2 dp2 zero2", "cp2 pp2", "ulysses2")),
    *(pytest.param(n, [], marks=pytest.mark.long) for n in ("cp2 ulysses2", "cp2 ulysses2 zero3 selective tiles")),
    pytest.param("cp2", ["train.activation_checkpointing=full", "gist.share=group"], marks=pytest.mark.long),
    pytest.param("cp2 selective tiles", [HOST], marks=pytest.mark.long),
]


@pytest.mark.parametrize("name,more", RECALL)
def test_recall_reads_the_same_over_context_ranks(tiny, tmp_path, name, more):
    """Chunks of other ranks are fetched: losses, gradients and the tokens that are unfolded are those of one process."""
    config = tiny.config(tmp_path / "c.yaml", gist={"chunk_sizes": [4, 2], "recall": "all"}, data={"raw_tokens": 256})
    steps = ["train.steps=4", "train.valid_every=2", *(m for m in more if m.startswith("gist"))]
    alone = train(config, tmp_path / "alone", 1, *steps)
    ranks, settings = LAYOUTS[name]
    metrics = train(config, tmp_path / "run", ranks, *steps, *settings, *more)
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        assert got.get("valid_loss") == pytest.approx(want.get("valid_loss"), abs=1e-5)
        assert want["unfolded_tokens"] > 0
        assert got["unfolded_tokens"] == pytest.approx(want["unfolded_tokens"], rel=1e-5)
        assert ("context_heads_bytes" in got) == ("ulysses" in name)
        if "cp" in name:
            assert got["context_ratio"] == got["context_bytes_dense"] / got["context_bytes"] > 0


EXACT = ["gist.word_aware=false", "gist.recall=all", "gist.chunk_sizes=[4,2]", "train.steps=3"]


@pytest.fixture(scope="module")
def alone_exact(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("exact") / "run", 1, *EXACT)


@pytest.mark.parametrize("name", ["cp2", "dp2 zero2 micro_batch 2", pytest.param("tp2 pp2", marks=pytest.mark.long)])
def test_chunks_of_one_length_over_layouts(name, config, alone_exact, tmp_path):
    ranks, settings = LAYOUTS[name]
    metrics = train(config, tmp_path / "run", ranks, *EXACT, *settings)
    for got, want in zip(metrics, alone_exact, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        assert (got["samples"], got["loss_tokens"]) == (want["samples"], want["loss_tokens"])


BF16 = ["pp2", *(pytest.param(n, marks=pytest.mark.long) for n in ("dp2 zero3", "tp2 sequence", "cp2"))]


@pytest.mark.parametrize("name", BF16)
def test_bf16_layouts_stay_close(name, config, tmp_path):
    alone = train(config, tmp_path / "alone", 1, STEPS, "precision=bf16")
    ranks, settings = LAYOUTS[name]
    metrics = train(config, tmp_path / "run", ranks, STEPS, "precision=bf16", *settings)
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 3e-3 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 0.05 * want["grad_norm"], "gradients of a micro-batch are missing"


@pytest.mark.parametrize("name", ["dp2 zero2 micro_batch 2", pytest.param("dp2 zero3", marks=pytest.mark.long)])
@pytest.mark.parametrize("precision,other", [("fp32", "bf16"), pytest.param("bf16", "fp32", marks=pytest.mark.long)])
def test_gradients_that_are_reduced_in_another_precision_stay_close(name, precision, other, config, alone, tmp_path):
    """fp32 in a bf16 run, bf16 in an fp32 run: the losses differ, and by no more than bf16 layouts do."""
    ranks, settings = LAYOUTS[name]
    steps = [STEPS, f"precision={precision}", *settings]
    own = alone if precision == "fp32" else train(config, tmp_path / precision, ranks, *steps)
    reduced = train(config, tmp_path / f"{precision}-{other}", ranks, *steps, f"parallel.reduce={other}")
    # One process has the layout's own losses within 2e-6.
    assert any(abs(got["loss"] - want["loss"]) > 2e-6 * want["loss"] for got, want in zip(reduced, own, strict=True))
    for got, want in zip(reduced, own, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 3e-3 * want["loss"]
