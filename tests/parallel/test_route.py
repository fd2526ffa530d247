"""The routing loss over ranks: exact on real ranks, and what is sent does not grow with the sequence."""

import re

import pytest
import torch

from tests import warm
from tests.kernels.route_cases import ALL, first_raw_rows, make_routed, queries_and_keys
from unfold.kernels.route import Routed
from unfold.model.gist import GistConfig, build_layout, build_recall
from unfold.model.parallel import route as subject
from unfold.model.parallel.division import Division
from unfold.model.parallel.route import rank_plan, routing_loss_over_ranks


@pytest.mark.parametrize("ranks,span", [(3, 2), pytest.param(11, 3, marks=pytest.mark.long)])
def test_the_shares_of_real_ranks_are_the_whole(ranks, span):
    """Values and gradients in fp64 on every layout case; some groups reach over ``span`` slices."""
    done = warm.command("tests.parallel.route_ranks", ranks)
    cases, most = map(int, re.search(r"CASES (\d+) SPAN (\d+)", done.stdout).groups())
    assert cases == len(ALL) + 4 and most >= span


class Ranks:
    """Stands for a process group."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("raw", [256, 4096])
def test_what_is_sent_does_not_grow_with_the_sequence(raw, monkeypatch):
    size, queries, heads, kv_heads, dim = 4, 16, 4, 2, 8
    config = GistConfig((4, 2))
    level = torch.tensor([-1] * 4 + ([-1] * 4 + [0] + [-1] * 4 + [0, 1]) * (raw // 8))
    level = torch.nn.functional.pad(level, (0, -len(level) % size), value=-1)[None]
    layout = build_layout(level, torch.zeros_like(level), config)
    tokens = (level[0] < 0).nonzero()[:, 0]
    sampled = torch.zeros_like(level, dtype=torch.bool)
    sampled[0, tokens[:: len(tokens) // queries][:queries]] = True
    tree = build_recall(layout, config, sampled)
    routed = Routed(tree, first_raw_rows(layout, tree.tokens))
    sent = []
    monkeypatch.setattr(subject.dist, "all_reduce", lambda x, *_, group: sent.append(x.numel()))
    monkeypatch.setattr(
        subject.dist,
        "all_gather_into_tensor",
        lambda out, x, group: (sent.append(x.numel()), out.view(size, -1).copy_(x.view(1, -1))),
    )
    division = Division.even([layout.intervals], size)
    own = rank_plan(routed, heads // kv_heads, division, 1, torch.device("cpu"))
    mine = own.mine
    q, k = torch.randn(len(mine), heads, dim), torch.randn(1, level.shape[1] // size, kv_heads, dim)
    routing_loss_over_ranks(q, k, routed, division, Ranks(1, size))
    assert own.most <= queries // size + 2
    # Queries; largest scores and sums of the teacher; of two levels largest scores, open masses by slice, sums and all masses.
    assert sorted(sent) == sorted([own.most * heads * dim, *(queries * heads * n for n in (1, 1, 2, 2 * division.slices, 4))])
    assert division.slices == 2


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(tokens=4), "routed: .* tokens per sample, but 4 were divided over the ranks"),
        (dict(k=torch.zeros(2, 5, 2, 8)), "k: shape .2, 5, 2, 8., expected"),
        (dict(q=torch.zeros(99, 4, 8)), "q: shape .99, 4, 8., expected"),
        (dict(dtype=torch.float64), "q: torch.float64, but k is torch.float32"),
    ],
)
def test_bad_arguments_are_named(change, message):
    layout, routed = make_routed("packed documents", multiple=4)
    tokens = layout.level.shape[1]
    halves = lambda tokens: Division(tokens, (((0, tokens // 2),), ((tokens // 2, tokens),)))
    division = halves(change.get("tokens", tokens))
    _, k = queries_and_keys(layout, routed, 4, 2, 8, torch.float32)
    mine = rank_plan(routed, 2, halves(tokens), 0, torch.device("cpu")).mine
    q = torch.zeros(len(mine), 4, 8, dtype=change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        k = change.get("k", k[:, : tokens // 2])
        routing_loss_over_ranks(change.get("q", q), k, routed, division, Ranks(0, 2))
