"""The kernels compile for GPUs that are not here, and take no more registers and memory than the committed table says."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.benchmarks.compiled import tables as aot
from tests.benchmarks.compiled.recall import recall_programs
from unfold.kernels.common.launch import HEAD_DIMS
from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed.tiles import TABLE, choose_tiles

TILES = choose_tiles("sm_90", 128, 2)
ALL = [
    (arch, name, dim, dtype)
    for arch in ("sm_80", "sm_90")
    for dim in HEAD_DIMS
    for dtype in aot.DTYPES
    for name in aot.programs(TILES)
]
# What training uses most, the other architecture, a padded head dimension, an exact kernel. All of it takes half an hour of two
# cores: `python -m tests.benchmarks.compiled --check`, or this test with -m long.
SOME = [
    ("sm_90", "forward", 128, "bf16"),
    ("sm_80", "d_key top", 128, "bf16"),
    ("sm_90", "d_query", 80, "fp16"),
    ("sm_90", "sum_parts", 64, "fp32"),
]


def compile_and_check(arch, name, dim, dtype):
    report = aot.program_source(arch, name, dim, dtype).compile().report()
    committed = aot.load_table()
    if committed[0] != aot.VERSION:
        pytest.skip(f"compiles, but the table was made with {committed[0]}: this is {aot.VERSION}, whose registers differ")
    assert not aot.check(aot.key_of(arch, name, dim, dtype), report, committed)


@pytest.mark.parametrize("arch,name,dim,dtype", SOME)
def test_compiles_within_bounds(arch, name, dim, dtype):
    compile_and_check(arch, name, dim, dtype)


@pytest.mark.long
@pytest.mark.parametrize("arch,name,dim,dtype", [x for x in ALL if x not in SOME])
def test_all_compile_within_bounds(arch, name, dim, dtype):
    compile_and_check(arch, name, dim, dtype)


def test_the_committed_table_is_whole_and_within_bounds():
    """Every program of every architecture, head dimension and dtype, with the tiles that the code has now."""
    _, table = aot.load_table()
    for arch, name, dim, dtype in ALL:
        report = table[aot.key_of(arch, name, dim, dtype)]
        assert not report.excess(arch, dtype)
        tile = aot.programs(TABLE[arch][max(64, 1 << (dim - 1).bit_length()), aot.DTYPES[dtype]])[name][1]
        assert report.tile == aot.describe(tile)


def test_a_worse_kernel_is_found():
    """The check fails on a larger tile: spills, shared memory, and growth against the table."""
    key = aot.key_of("sm_90", "forward", 128, "bf16")
    large = aot.program_source("sm_90", "forward", 128, "bf16", Tile(128, 256, 4, 3)).compile().report()
    made_with, table = aot.load_table()
    wrong = "\n".join(aot.check(key, large, (aot.VERSION, table)))
    assert "spills" in wrong and "spill_bytes 0 ->" in wrong and "of shared memory, sm_90 has" in wrong
    assert "registers" not in "\n".join(aot.check(key, large, ("another compiler", table)))
    assert aot.check(key, large, (aot.VERSION, {}))[-1].endswith("not in the committed table")


RECALL = [job[1:] for job in aot.jobs_of("recall", ("sm_80", "sm_90"))]
SOME_RECALL = [
    ("sm_90", "unfold", 128, "bf16"),
    ("sm_90", "select take head below", 128, "bf16"),
    ("sm_80", "decode attend", 128, "bf16"),
]


@pytest.mark.parametrize(
    "arch,name,dim,dtype", [x if x in SOME_RECALL else pytest.param(*x, marks=pytest.mark.long) for x in RECALL]
)
def test_recall_compiles_within_bounds(arch, name, dim, dtype):
    report = aot.recall_source(arch, name, dim, dtype).compile().report()
    committed = aot.load_table(aot.RECALL_TABLE)
    if committed[0] != aot.VERSION:
        pytest.skip(f"compiles, but the table was made with {committed[0]}: this is {aot.VERSION}, whose registers differ")
    assert not aot.check(aot.key_of(arch, name, dim, dtype), report, committed)


def test_the_committed_table_of_recall_is_whole_and_within_bounds():
    """Every program of both architectures, every head dimension and dtype, with the tiles that the code has now."""
    _, table = aot.load_table(aot.RECALL_TABLE)
    programs = {
        (arch, dim, dtype): recall_programs(arch, dim, dtype, aot.DTYPES[dtype], aot.HEADS, aot.KV_HEADS)
        for arch in ("sm_80", "sm_90")
        for dim, dtype in aot.COMBINATIONS
    }
    for arch, name, dim, dtype in RECALL:
        report = table[aot.key_of(arch, name, dim, dtype)]
        assert not report.excess(arch, dtype)
        assert report.tile == aot.describe(programs[arch, dim, dtype][name].tile)


def test_parts_are_the_whole_and_have_every_program():
    parts = [aot.jobs_of("recall", ("sm_80", "sm_90"), str(part + 1)) for part in range(aot.PARTS)]
    whole = aot.jobs_of("recall", ("sm_80", "sm_90"))
    assert sorted(sum(parts, [])) == sorted(whole)
    programs = {(arch, name) for _, arch, name, _, _ in whole}
    assert all({(arch, name) for _, arch, name, _, _ in part} == programs for part in parts)
