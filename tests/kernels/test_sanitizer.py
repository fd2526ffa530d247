"""The sanitizer catches what small kernels do wrong, and all kernels of the project pass it."""

import importlib.util
import inspect
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from tests.kernels.cases import make_layout, random_qkv
from tests.kernels.interpreter import compute_like_a_gpu, in_the_interpreter
from tests.kernels.recall_cases import make_recall, make_rule, recalling, set_apart
from tests.kernels.route_cases import make_routed, queries_and_keys
from tests.kernels.sanitizer import ROOT, SanitizerError, sanitized
from tests.kernels.test_decode import batch, few_or_many_splits, rule_of, run_kernels
from tests.kernels.uniform import gradients
from unfold.kernels.compressed import compressed_attention
from unfold.kernels.compressed import plan as compressed_plan
from unfold.kernels.decode import triton as backend
from unfold.kernels.route import routing_loss
from unfold.kernels.select import chosen_gists
from unfold.kernels.unfold import plan as unfold_plan
from unfold.kernels.unfold import recall_attention, select_to_unfold, turn, unfold_attention
from unfold.kernels.unfold.plan import level_0_gists


@pytest.fixture(autouse=True)
def faithful_interpreter(monkeypatch):
    compute_like_a_gpu(monkeypatch)


# Small kernels, most of them wrong.


@triton.jit
def load_some(p_x, o_x, m_x):
    return tl.load(p_x + o_x, mask=m_x)


@triton.jit
def copy_kernel(p_x, p_y, n, BN: tl.constexpr):
    o_x = tl.program_id(0) * BN + tl.arange(0, BN)
    m_x = (o_x < n) & (n > 0)  # of a block and a scalar the interpreter makes numbers
    tl.store(p_y + o_x, load_some(p_x, o_x, m_x), mask=m_x)


@triton.jit
def shift_kernel(p_x, p_y, i_shift):
    """y[i] = x[i + shift]"""
    tl.store(p_y + tl.program_id(0), tl.load(p_x + tl.program_id(0) + i_shift))


@triton.jit
def meet_kernel(p_x, WHAT: tl.constexpr):
    """All programs store to one element."""
    tl.store(p_x, tl.program_id(0) if WHAT == "different" else 1)


@triton.jit
def count_kernel(p_count, p_order, READ: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.atomic_add(p_count, 1)
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_order + tl.program_id(0), tl.load(p_count) if READ else i)


@triton.jit
def turn_kernel(p_x, BARRIER: tl.constexpr):
    """Store, then load what other lanes stored."""
    o_x = tl.arange(0, 4)
    tl.store(p_x + o_x, o_x)
    if BARRIER:
        tl.debug_barrier()
    b_x = tl.load(p_x + 3 - o_x)
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_x + o_x, b_x)


@triton.jit
def lanes_kernel(p_x, STEP: tl.constexpr):
    """Neighbouring lanes store to one element."""
    tl.store(p_x + tl.arange(0, 4) // 2, tl.arange(0, 4) // STEP)


@triton.jit
def gather_kernel(p_x, i_from):
    o_x = tl.arange(0, 4)
    b_x = tl.gather(tl.load(p_x + o_x), i_from + o_x, 0)
    tl.store(p_x + o_x, b_x, mask=i_from + o_x < 4)


@triton.jit
def misaligned_kernel(p_x):
    tl.store((p_x.to(tl.pointer_type(tl.int8)) + 1).to(tl.pointer_type(tl.int32)), 1)


def refused(message: str):
    return pytest.raises(SanitizerError, match=message)


def line_of(kernel, text: str) -> int:
    lines, first = inspect.getsourcelines(kernel.fn)
    return first + next(i for i, line in enumerate(lines) if text in line)


@in_the_interpreter
def test_a_right_kernel_passes():
    with sanitized() as sanitizer:
        x = torch.arange(10.0)
        y, z = torch.empty_like(x), x.new_empty(10)
        copy_kernel[3,](x, y, 10, BN=4)
        copy_kernel[3,](y, z, 10, BN=4)
        assert torch.equal(z, x)
    assert sanitizer.launched == {"copy_kernel"}


@in_the_interpreter
def test_a_fault_is_named_with_kernel_program_argument_element_and_lines():
    inner, outer = line_of(load_some, "tl.load"), line_of(copy_kernel, "tl.store")
    at = f"tests/kernels/test_sanitizer.py:{inner} (load_some), called from tests/kernels/test_sanitizer.py:{outer} (copy_kernel)"
    message = f"unwritten memory: copy_kernel, program (1, 0, 0) loads p_x at {at}, element 6 of float32 [8]"
    with sanitized(), refused(re.escape(message)):
        x = torch.empty(8)
        x[:6] = 1
        copy_kernel[2,](x, torch.empty(8), 8, BN=4)


@in_the_interpreter
@pytest.mark.parametrize(
    "make", [lambda: torch.empty(4), lambda: torch.empty_like(torch.ones(4)), lambda: torch.ones(1).new_empty(4)]
)
def test_unwritten_memory(make):
    with sanitized():
        with refused("unwritten memory: copy_kernel, .* element 0 of"):
            copy_kernel[1,](make(), torch.empty(4), 4, BN=4)
        with refused("unwritten memory: torch's add reads float32 \\[4\\], element \\(0,\\)"):
            make() + 1
        copy_kernel[1,](make().zero_(), torch.empty(4), 4, BN=4)
        copy_kernel[1,](torch.arange(4).cumsum(0), torch.empty(4), 4, BN=4)


@in_the_interpreter
def test_what_a_kernel_leaves_unwritten():
    with sanitized():
        x = torch.empty(8)
        copy_kernel[1,](torch.ones(4), x, 3, BN=4)
        assert x[:3].sum() == 3
        assert x[torch.tensor([2, 0])].sum() == x.index_select(0, torch.tensor([1, 1])).sum() == 2
        for read in (lambda: x[:4].sum(), lambda: x[torch.arange(4)], lambda: x.gather(0, torch.arange(4))):
            with refused("torch's (sum|index|gather) reads float32 .*, element \\(3,\\)"):
                read()


@in_the_interpreter
@pytest.mark.parametrize("first", [0, 4])
def test_out_of_bounds(first):
    """Of the tensor, wherever in its storage it lies."""
    x = torch.ones(12)[first : first + 4]
    with sanitized():
        with refused("out of bounds: copy_kernel, program \\(1, 0, 0\\) loads p_x .* element 4 of float32 \\[4\\]"):
            copy_kernel[2,](x, torch.empty(8), 5, BN=4)
        with refused("out of bounds: copy_kernel, .* stores p_y .* element 4 of"):
            copy_kernel[2,](torch.ones(8), x, 5, BN=4)
        with refused("out of bounds: shift_kernel, .* loads p_x .* element -1 of"):
            shift_kernel[1,](x, torch.empty(1), -1)
        with refused("out of bounds: copy_kernel, .* float32 \\[0\\]"):
            copy_kernel[1,](x[:0], torch.empty(8), 1, BN=4)


@in_the_interpreter
def test_other_tensors_are_reached_from_an_argument_only_where_that_is_declared():
    x, z = torch.ones(4), torch.full((4,), 2.0)
    far = (z.data_ptr() - x.data_ptr()) // 4
    with sanitized() as sanitizer:
        with refused("out of bounds: shift_kernel"):
            shift_kernel[4,](x, torch.empty(4), far)
        sanitizer.reach("p_x", [z])
        y = torch.empty(4)
        shift_kernel[4,](x, y, far)
        assert torch.equal(y, z)
        with refused("out of bounds: shift_kernel"):
            shift_kernel[4,](x, y, far + 1)


@in_the_interpreter
def test_two_programs_store_to_one_address():
    line = line_of(meet_kernel, "tl.store")
    stores = rf"program \(\d, 0, 0\) stores p_x at tests/kernels/test_sanitizer.py:{line} \(meet_kernel\)"
    for what in ("different", "same"):
        with sanitized(), refused(f"race: meet_kernel, {stores}, element 0 of .*; before it {stores}"):
            meet_kernel[2,](torch.zeros(1, dtype=torch.int32), WHAT=what)


@in_the_interpreter
def test_one_value_stored_twice_can_be_declared_harmless():
    with sanitized(same=["meet_kernel.p_x"]):
        meet_kernel[2,](torch.zeros(1, dtype=torch.int32), WHAT="same")
        with refused("race: meet_kernel"):
            meet_kernel[2,](torch.zeros(1, dtype=torch.int32), WHAT="different")


@in_the_interpreter
@pytest.mark.parametrize("seed", range(4))
def test_one_program_loads_what_another_stores(seed):
    """Whichever comes first."""
    with sanitized(seed), refused(r"race: shift_kernel, .*; before it program .* (loads|stores) p_"):
        x = torch.arange(9.0)
        shift_kernel[2,](x, x, 1)


@in_the_interpreter
def test_atomics_meet_atomics_alone():
    zeros = lambda n: torch.zeros(n, dtype=torch.int32)
    with sanitized():
        count_kernel[5,](count := zeros(1), zeros(5), READ=False, BARRIER=False)
        assert count == 5
        with refused("no barrier: count_kernel, .* loads p_count .*; before it .* updates p_count"):
            count_kernel[5,](zeros(1), zeros(5), READ=True, BARRIER=False)
        with refused("race: count_kernel, .* updates p_count .*; before it .* loads p_count"):
            count_kernel[5,](zeros(1), zeros(5), READ=True, BARRIER=True)


@in_the_interpreter
def test_programs_run_in_a_shuffled_order():
    def order(seed):
        with sanitized(seed):
            count_kernel[20,](torch.zeros(1, dtype=torch.int32), out := torch.empty(20, dtype=torch.int32), False, False)
        return out.tolist()

    assert order(0) == order(0) != order(1)
    assert order(0) != sorted(order(0)) == list(range(20))


@in_the_interpreter
def test_a_program_meets_its_own_stores_only_behind_a_barrier():
    with sanitized():
        x = torch.empty(4, dtype=torch.int32)
        turn_kernel[1,](x, BARRIER=True)
        assert x.tolist() == [3, 2, 1, 0]
        with refused("no barrier: turn_kernel, .* loads p_x .*; before it program \\(0, 0, 0\\) stores p_x"):
            turn_kernel[1,](x, BARRIER=False)


@in_the_interpreter
def test_lanes_that_store_to_one_element():
    with sanitized():
        x = torch.empty(4, dtype=torch.int32)
        lanes_kernel[1,](x, STEP=2)
        with refused("two lanes store different values: lanes_kernel, .* stores p_x .* element 0 of int32"):
            lanes_kernel[1,](x, STEP=1)


@in_the_interpreter
def test_places_of_a_gather():
    with sanitized():
        gather_kernel[1,](torch.ones(4), 0)
        for first in (-1, 1):
            with refused(f"out of bounds: gather_kernel, .* gathers from places {first} .. {first + 3} of 4"):
                gather_kernel[1,](torch.ones(4), first)


@in_the_interpreter
def test_misaligned_addresses():
    with sanitized(), refused("misaligned: misaligned_kernel, .* stores p_x"):
        misaligned_kernel[1,](torch.zeros(4, dtype=torch.int32))


# The project's kernels. A case takes the sanitizer, or None for the plain run that it is compared with.


def compressed(name, heads, kv_heads, dtype):
    def case(_):
        layout, _config = make_layout(name)
        *qkv, d_out = random_qkv(layout, heads, kv_heads, 64, dtype)
        return gradients(lambda *x: compressed_attention(*x, layout.intervals, backend="triton"), qkv, d_out)

    return case


def recall(name, heads, kv_heads, dtype, rule_name, share="head"):
    """A whole layer of which some tokens recall: selection, unfolding and the rest, forward and backward."""

    def case(_):
        layout, config, tree = make_recall(name)
        *qkv, d_out = random_qkv(layout, heads, kv_heads, 64, dtype)
        rule = make_rule(rule_name, config, share)
        return gradients(lambda *x: recall_attention(*x, tree, rule, backend="triton")[0], qkv, d_out)

    return case


def fetched(name, heads, kv_heads, dtype, rule_name):
    """What a rank does that shares a sequence: its queries select, mark what they chose, and find chunks of others apart."""

    def case(_):
        layout, config, tree = make_recall(name)
        q, k, v, d_out = (x.detach() for x in random_qkv(layout, heads, kv_heads, 64, dtype))
        (tree, tokens), q, d_out = set_apart(tree), recalling(q, tree), recalling(d_out, tree)
        lists = select_to_unfold(q, k, tree, make_rule(rule_name, config, "head"), backend="triton")
        marks = chosen_gists(tree, lists, level_0_gists(tree))
        apart = [x.flatten(0, 1)[tokens] for x in (k, v)]
        attend = lambda q, k, v, *apart: unfold_attention(q, k, v, tree, lists, apart=apart, backend="triton")
        return marks, *gradients(attend, (q, k, v, *apart), d_out)

    return case


def decode(name, budget, share="head", recalls=True, splits="some"):
    def case(sanitizer):
        q, caches, step = batch(name, 4, 2, 64, torch.float32, recalls=recalls)
        if sanitizer:  # rows and their ends are reached from one address each
            sanitizer.reach("p_anchor", [rows.memory for layer in caches for rows in layer])
            sanitizer.reach("p_ends", [end for borders in step.borders for end in borders.ends_on(q.device)[0]])
        return (run_kernels(q, caches, step, rule_of(budget, share), tiles=few_or_many_splits()[splits]),)

    return case


def keep(name):
    """New keys and values, strided as a joint projection makes them: most of raw tokens, the last one of a top gist."""

    def case(sanitizer):
        q, caches, step = batch(name, 4, 2, 64, torch.float32)
        if sanitizer:
            sanitizer.reach("p_anchor", [rows.memory for layer in caches for rows in layer])
        places = backend.make_places(q, caches, step, step.borders[0].ends_on(q.device)[0][0])
        items = torch.stack([torch.full_like(step.span, step.levels), step.upto[-1] - 1], 1)
        items[-1] = torch.tensor([0, step.upto[0, -1] - 1])
        new = torch.randn(len(q), 2, 2, 64, generator=torch.Generator().manual_seed(1))
        backend.keep(new[:, 0], new[:, 1], q, places, items)
        kept = [caches[i][s].buffer.rows[:, :, row] for i, (s, row) in enumerate(items.tolist())]
        assert torch.equal(torch.stack(kept), new)
        return [rows.buffer.rows for layer in caches for rows in layer]

    return case


def route(name, heads, kv_heads, dtype, far, share):
    """The routing loss and the gradient of the gists, in slices of two blocks of queries."""

    def case(_):
        layout, routed = make_routed(name, share=share)
        q, k = queries_and_keys(layout, routed, heads, kv_heads, 64, dtype)
        loss = routing_loss(q, k, routed, far=far, backend="triton")
        return loss.detach(), *torch.autograd.grad(loss, k)

    return case


COMPRESSED = {"forward_kernel", "d_query_kernel", "d_key_kernel", "sum_parts_kernel"}
SELECT = {"score_kernel", "bound_kernel", "take_kernel"}
CHUNKS = {"tally_kernel", "fold_kernel", "fill_kernel", "chunk_d_key_kernel", "add_chunks_kernel"}
UPPER = {"spread_kernel", "upper_d_key_kernel", "add_upper_kernel"}
UNFOLD = {"place_kernel", "unfold_kernel", "unfold_d_query_kernel", "by_token_kernel"} | CHUNKS | UPPER
RECALL = COMPRESSED | SELECT | UNFOLD
ATTEND = {"attend_kernel", "combine_kernel"}
DECODE = {"score_top_kernel", "score_below_kernel", "select_kernel"} | ATTEND
ROUTE = {"raw_sum_kernel", "mass_kernel", "upper_kernel", "student_kernel", "d_gist_kernel"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: (case, the kernels that it reaches)
CASES = {
    "compressed, packed documents": (compressed("packed documents", 1, 1, FP32), COMPRESSED),
    "recall, packed documents": (recall("short suffixes of two samples", 2, 1, FP32, "fixed"), RECALL - {"add_upper_kernel"}),
    "recall, summed scores": (recall("suffix", 4, 1, BF16, "everything", "group"), RECALL),
    "recall, chunks apart": (
        fetched("suffix", 2, 1, FP32, "adaptive"),
        SELECT | UNFOLD - {"add_upper_kernel"} | {"mark_kernel", "d_key_kernel"},
    ),
    "decode": (decode("two levels", "adaptive"), DECODE),
    "decode, summed scores, many splits": (decode("two levels", "adaptive", "group", splits="a tile each"), DECODE),
    "decode, nothing recalls": (decode("long suffix", "three", recalls=False), ATTEND),
    "decode, keep": (keep("joined"), {"keep_kernel"}),
    "route, packed documents": (route("suffixes of packed documents", 2, 1, FP32, True, 0.5), ROUTE),
}
LONG = {
    "compressed, three levels": (compressed("closed context", 2, 1, BF16), COMPRESSED),
    "compressed, 16 bits": (compressed("packed documents", 4, 2, FP16), COMPRESSED),
    "recall, three levels": (recall("suffixes of packed documents", 2, 1, FP32, "everything"), RECALL),
    "recall, every token, nothing to select": (
        recall("shorter than a chunk", 2, 2, FP32, "adaptive"),
        RECALL - UPPER,
    ),
    "decode, four levels": (decode("four levels", "adaptive", splits="one program"), DECODE),
    "decode, everything": (decode("two levels", "everything", splits="a tile each"), DECODE),
    "decode, no sink": (decode("no sink", "one", "group"), DECODE),
    "route, 16 bits": (route("jittered chunks", 4, 2, BF16, False, 0.2), ROUTE),
    "route, one level": (route("one level", 1, 1, FP16, True, 0.3), ROUTE - {"upper_kernel"}),
}


@in_the_interpreter
@pytest.mark.parametrize(
    "name,seed", [*((n, 0) for n in CASES), *(pytest.param(n, 1, marks=pytest.mark.long) for n in CASES | LONG)]
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:divide by zero")
def test_kernels_of_the_project(name, seed, monkeypatch):
    """No fault, and whatever the order of programs the same bits. Lists are cut into parts as in far longer sequences."""
    for owner in (compressed_plan, unfold_plan):
        monkeypatch.setattr(owner, "SHORTEST_SPLIT", 24)
    monkeypatch.setattr(unfold_plan, "SHORTEST_PART", 1)
    monkeypatch.setattr(turn, "SHORTEST_LIST", 5)
    case, kernels = (CASES | LONG)[name]
    with sanitized(seed) as sanitizer:
        shuffled = [x.clone() for x in case(sanitizer)]  # reads all of it
    assert sanitizer.launched == kernels
    assert all(torch.equal(a, b) for a, b in zip(shuffled, case(None)))


def test_every_kernel_is_reached():
    sources = (path.read_text() for path in ROOT.glob("kernels/**/*.py"))
    kernels = {name for source in sources for name in re.findall(r"^@kernel\ndef (\w+)", source, re.M)}
    assert kernels == set().union(*(reached for _, reached in CASES.values()))
