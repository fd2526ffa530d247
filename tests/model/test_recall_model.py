"""The model with recall: gradients reach what was unfolded, the first layer never recalls, everything selected is dense."""

import numpy as np
import torch

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.gist import Recall, build_layout, interleave
from unfold.model.transformer import Transformer, build_model
from unfold.model.visibility import IGNORED, MicroBatch

VOCAB = 60


def make(build, layers=3):
    config = ModelConfig(VOCAB, hidden_size=32, layers=layers, heads=4, kv_heads=2, ffn_size=48, init_std=0.2)
    return Transformer(config, build).double()


def micro_batch(config: GistConfig, lengths=(90, 50)):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 50, sum(lengths))
    sample = interleave(raw, list(lengths), np.ones(50, bool), config, range(50, 50 + config.levels))
    level, doc = torch.from_numpy(sample.level)[None], torch.from_numpy(sample.doc)[None]
    layout = build_layout(level, doc, config)
    ids = torch.from_numpy(sample.ids)[None]
    labels = torch.where(level < 0, ids, IGNORED)
    return MicroBatch(ids, labels, layout, Recall.of(layout, config))


def test_recall_changes_the_later_layers_only(build):
    model = make(build)
    forgetting, recalling = (micro_batch(GistConfig((4, 2), recall=r, topk=2 if r == "all" else None)) for r in ("none", "all"))
    assert forgetting.recall is None and recalling.recall.tree.queries == 140
    one_layer = make(build, layers=1)
    with torch.no_grad():
        assert torch.equal(one_layer(forgetting), one_layer(recalling)), "the first layer never recalls"
        assert model(forgetting) != model(recalling)
    assert set(recalling.recall.stats) == {1, 2}
    assert all(s.unfolded > 0 for s in recalling.recall.stats.values())


def test_gradients_reach_what_was_unfolded(build):
    """Of one late token's loss, with respect to the embeddings of tokens far before its window."""
    model = make(build)
    batch = micro_batch(GistConfig((4, 2), recall="all", topk=3), (90,))
    last = int((batch.layout.level[0] < 0).nonzero()[-1])
    labels = torch.full_like(batch.labels, IGNORED)
    labels[0, last] = 7
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out.retain_grad() or out))
    model(MicroBatch(batch.ids, labels, batch.layout, batch.recall)).backward()
    grad = embedded[0].grad[:, 0].norm(dim=1)
    far = torch.arange(len(grad)) < last - 30
    assert ((grad > 0) & far & (batch.layout.level[0] >= 0)).any(), "selected gists"
    assert ((grad > 0) & far & (batch.layout.level[0] < 0)).sum() > 3, "raw tokens behind them"


def test_a_model_alone_is_that_of_a_group_of_one(build):
    """Loss, gradients and logits, to the last bit."""
    config = ModelConfig(VOCAB, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=48, qk_norm=True)
    batch = micro_batch(GistConfig((4, 2), recall="all"))
    results = []
    for model in (Transformer(config, build), build_model(config, build.seed)):
        loss = model(batch)
        loss.backward()
        results.append([loss.detach(), model.logits(batch.ids, batch.layout), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
