"""Run by test_route.py in a process of its own: the routing loss over real ranks against that of whole samples, fp64."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from tests.forked import run_ranks
from tests.kernels.route_cases import ALL, make_routed, queries_and_keys
from unfold.kernels.route import cpu, routing_loss
from unfold.model.parallel.division import Division
from unfold.model.parallel.route import rank_plan, routing_loss_over_ranks

TOLERANCE = dict(rtol=1e-10, atol=1e-10)


def check(name: str, far: bool, share: float) -> int:
    """Compare one case; returns how many slices a group of it spans at most."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layout, routed = make_routed(name, share=share, multiple=size)
    division = Division.even([layout.intervals], size)
    q, k = queries_and_keys(layout, routed, 4, 2, 8, torch.float64)
    want = routing_loss(q, k, routed, far=far)
    gradient = torch.autograd.grad(2 * want, k)[0]

    part = lambda x: division.part(x, 1, rank)
    every = torch.zeros(*layout.level.shape, 4, 8, dtype=q.dtype)
    every.flatten(0, 1)[routed.tree.tokens] = q
    mine = part(every).flatten(0, 1)[rank_plan(routed, 2, division, rank, every.device).mine]
    own = part(k).detach().clone().requires_grad_()
    over_ranks = lambda: routing_loss_over_ranks(mine, own, routed, division, dist.group.WORLD, far=far)
    got = over_ranks()
    torch.testing.assert_close(torch.autograd.grad(2 * got, own)[0], part(gradient), **TOLERANCE)
    total = got.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, want.detach(), **TOLERANCE)
    with torch.no_grad():
        assert torch.equal(over_ranks(), got.detach())
    return slices_of_a_group(routed, division)


def slices_of_a_group(routed, division: Division) -> int:
    """Over how many slices a group reaches, from its first member to its gist, of the group with most."""
    tree, most = routed.tree, 1
    starts = torch.tensor(sorted(start for own in division.spans for start, _ in own))
    slice_of = lambda b, row: int(torch.searchsorted(starts, tree.others.rows[b, row], right=True))
    for b in range(tree.others.batch):
        for row in range(int(tree.others.segment_start[b, tree.levels])):
            if tree.child_hi[b, row] > tree.child_lo[b, row]:
                most = max(most, slice_of(b, row) - slice_of(b, int(tree.child_lo[b, row])) + 1)
    return most


def rank_main(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    cases = [(name, i % 2 == 0, 0.3) for i, name in enumerate(ALL)]
    cases += [(name, False, share) for name in ("three levels", "closed context") for share in (0.04, 0.0)]
    most = 1
    for i, case in enumerate(cases):
        # Now few large blocks and pieces, now many small ones.
        cpu.QUERIES, cpu.SCORES["cpu"] = ((64, 2**16), (5, 40))[i // 2 % 2]
        try:
            most = max(most, check(*case))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    if rank == 0:
        print(f"CASES {len(cases)} SPAN {most}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_ranks(rank_main, int(sys.argv[1])))
