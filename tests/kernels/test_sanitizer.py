"""The sanitizer catches what small kernels do wrong."""

import importlib.util
import inspect
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from tests.kernels.interpreter import compute_like_a_gpu, in_the_interpreter
from tests.kernels.sanitizer import SanitizerError, sanitized


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
