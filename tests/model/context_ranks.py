"""Run by test_context_parallel.py in a process of its own: recall over real ranks against that of the whole sequence, fp64."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.distributed as dist

from tests.forked import run_ranks
from tests.kernels.cases import padded
from tests.kernels.recall_cases import CASES, RULES, SUFFIX_CASES, make_layout, make_rule, random_qkv, suffix_layout
from unfold.kernels.compressed import compressed_attention
from unfold.kernels.unfold import recall_attention
from unfold.model.gist import Recall, build_recall
from unfold.model.parallel.context import ContextAttention, ContextParallel
from unfold.model.parallel.tensor import Alone
from unfold.model.visibility import MicroBatchAttention

TOLERANCE = 1e-12


def padded_case(name: str, multiple: int):
    """A case padded to a multiple of the ranks: layout, config, tree; in those of plain text every raw token recalls."""
    if name in SUFFIX_CASES:
        layout, config, recalls = suffix_layout(name)
    else:
        layout, config = make_layout(name)
        recalls = layout.doc >= 0
    pad = lambda x, empty: torch.nn.functional.pad(x, (0, -x.shape[1] % multiple), value=empty)
    layout = padded(layout, config, multiple)
    return layout, config, build_recall(layout, config, pad(recalls, False))


def check(name: str, rule_name: str, share: str, context: ContextParallel) -> None:
    layout, config, tree = padded_case(name, dist.get_world_size())
    rule = make_rule(rule_name, config, share)
    q, k, v, d_out = random_qkv(layout, 4, 2, 8, torch.float64)
    want, read = recall_attention(q, k, v, tree, rule)
    grads = torch.autograd.grad(want, (q, k, v), d_out)

    own = context.of(layout)
    part = lambda x: own.take(x, 1)
    recall = Recall(tree, rule)
    attend = ContextAttention(own, None, layout, recall)  # layers before the first that recalls would need what makes attention
    mine = [part(x).detach().clone().requires_grad_() for x in (q, k, v)]
    got = attend(1, *mine)
    pairs = [(got, part(want)), *zip(torch.autograd.grad(got, mine, part(d_out)), map(part, grads))]
    for ours, whole in pairs:
        torch.testing.assert_close(ours, whole, atol=TOLERANCE, rtol=0)
    for name_of, expected in (("unfolded", read.unfolded), ("selected", read.selected)):
        total = getattr(recall.stats[1], name_of).double()
        dist.all_reduce(total)
        torch.testing.assert_close(total / dist.get_world_size(), expected.double(), atol=1e-5, rtol=1e-5)


def check_first_layer(context: ContextParallel) -> None:
    """Layers before the first that recalls forget."""
    layout, config, tree = padded_case("own group, closed context", dist.get_world_size())
    q, k, v, _ = (x.detach() for x in random_qkv(layout, 4, 2, 8, torch.float64))
    recall = Recall(tree, make_rule("fixed", config, "head"), first_layer=2)
    own = context.of(layout)
    attend = ContextAttention(own, partial(MicroBatchAttention, "gist"), layout, recall)
    forgetting, recalling = compressed_attention(q, k, v, layout.intervals), recall_attention(q, k, v, tree, recall.rule)[0]
    for index, want in ((1, forgetting), (2, recalling)):
        got = attend(index, *(own.take(x, 1) for x in (q, k, v)))
        torch.testing.assert_close(got, own.take(want, 1), atol=TOLERANCE, rtol=0)


def make_context(heads: int) -> ContextParallel:
    """heads: so many neighbours trade heads."""
    if heads == 1:
        return ContextParallel(dist.group.WORLD, Alone())
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)  # its Ulysses sends by way of it
    ranks = torch.arange(dist.get_world_size()).view(-1, heads)
    neighbours, across = (dist.new_subgroups_by_enumeration(x.tolist())[0] for x in (ranks, ranks.T))
    return ContextParallel(across, neighbours)


def rank_main(heads: int, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    context = make_context(heads)
    rules = [("adaptive, small ratio", "head"), ("fixed", "group"), ("everything", "head"), ("top-p", "head")]
    assert {name for name, _ in rules} <= set(RULES)
    cases = [(name, *rule) for name in (*CASES, *SUFFIX_CASES) for rule in rules]
    for case in cases:
        try:
            check(*case, context)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    check_first_layer(context)
    if rank == 0:
        print(f"CASES {len(cases)} SENT {context.traffic.take().sent}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_ranks(partial(rank_main, int(sys.argv[2])), int(sys.argv[1])))
