"""The kernels of recall and routing on random micro-batches, against the CPU path; and the room that their lists have."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.kernels.interpreter import DEVICE, compute_like_a_gpu, needs_runs
from tests.kernels.random_cases import gradients, random_case
from tests.kernels.rooms import check_room
from unfold.kernels.route import routing_loss
from unfold.kernels.select import select_gists
from unfold.kernels.select import triton as backend
from unfold.kernels.select.blocks import block_lists, query_blocks
from unfold.kernels.unfold import recall_attention
from unfold.kernels.unfold.plan import upper_parts

SCALE = 1 / 64  # scores of whole numbers of some hundreds: weights of all sizes
DIMS = (64, 64, 80, 128)
TOLERANCE = dict(rtol=1e-4, atol=1e-3)  # of fp32 sums of values and gradients of up to some tens
# Few queries, and quick; the others take the interpreter longer.
SEEDS = [25, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(60) if seed != 25)]


@needs_runs
@pytest.mark.parametrize("seed", SEEDS)
def test_kernels_equal_the_cpu_path(seed, monkeypatch):
    if backend.INTERPRETED:
        compute_like_a_gpu(monkeypatch)
    case = random_case(seed, by_number=True)
    *qkv, d_out = case.draw(DIMS[seed % 4], torch.float32, seed)
    asking = case.tree_queries(qkv[0])
    on_cpu = select_gists(asking, qkv[1], case.tree, case.rule, scale=1.0, backend="cpu")
    tree, found = case.tree.to(DEVICE), (x.to(DEVICE) for x in (asking, qkv[1]))
    found = select_gists(*found, tree, case.rule, backend="triton")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found.start + found.rows, on_cpu.start + on_cpu.rows))
    read = {}

    def layer(name, device):
        def run(*leaves):
            out, read[name] = recall_attention(*leaves, case.tree.to(device), case.rule, scale=SCALE, backend=name)
            return out

        return [x.cpu() for x in gradients(run, [x.to(device) for x in qkv], d_out.to(device))]

    def loss(name, device):
        asking, routed = case.routed_queries(qkv[0]).to(device), case.routed.to(device)
        run = lambda k: routing_loss(asking, k, routed, far=case.far, scale=SCALE, backend=name)
        return [x.cpu() for x in gradients(run, [qkv[1].to(device)])]

    for a, b in zip(layer("triton", DEVICE) + loss("triton", DEVICE), layer("cpu", "cpu") + loss("cpu", "cpu")):
        torch.testing.assert_close(a, b, **TOLERANCE)
    torch.testing.assert_close(read["triton"].unfolded.cpu(), read["cpu"].unfolded)
    torch.testing.assert_close(read["triton"].selected.cpu(), read["cpu"].selected)


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(20, 300))])
def test_no_list_outgrows_its_room(seed):
    case = random_case(seed, by_number=True)
    q, k, *_ = case.draw(5, torch.float32, seed)
    if case.tree.queries:
        selection = select_gists(case.tree_queries(q), k, case.tree, case.rule, scale=1.0, backend="cpu")
        for size in (1, 6, 32):
            check_room(case.tree, case.rule, block_lists(case.tree, selection, size), case.heads)


@pytest.mark.parametrize("size,width", [(1, 2), (32, 3)])
def test_groups_of_upper_gists_have_the_blocks_that_reach_them(size, width):
    """Of every group the parts run, without a gap, from the first block whose queries' ranges reach into it to the last one."""
    several = 0
    for case in (random_case(seed) for seed in range(25)):
        tree, blocks = case.tree, query_blocks(case.tree, size)
        found = {}
        for sample, first, last, start, stop, _ in upper_parts(tree, size, width).table.tolist():
            assert stop > start
            found.setdefault((sample, first, last), []).append((start, stop))
        want = {}
        for number, (a, b, sample) in enumerate(blocks.table.tolist()):
            for s in range(tree.levels - 1):
                lo, hi = tree.lo[s, a:b], tree.hi[s, a:b]
                if (some := hi > lo).any():
                    for group in range(int(lo[some].min()) // width, (int(hi[some].max()) - 1) // width + 1):
                        want.setdefault((sample, group * width), []).append(number)
        assert {key[:2] for key in found} == set(want)
        for key, parts in found.items():
            parts.sort()
            assert all(a[1] == b[0] for a, b in zip(parts, parts[1:]))
            assert (parts[0][0], parts[-1][1]) == (min(want[key[:2]]), max(want[key[:2]]) + 1)
        several += len(want) > 2
    assert several > 3
