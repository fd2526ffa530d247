"""Compiles every kernel for GPUs that need not be there, and says what each program takes: registers, spills, shared memory.

    python -m tests.benchmarks.compiled [--ops compressed recall] [--arch sm_80 sm_90] [--dtype bf16 fp16 fp32] [--dim 64 ..]
        [--only PROGRAM ..] [--check] [--part N] [--workers N] [--output docs/benchmarks]

Writes ``compressed_aot.json`` and ``recall_aot.json`` (one entry per architecture, kernel, head dimension and dtype; entries not
compiled this time stay as they were) and the same as pages, ``.md``. Recall is selection, unfolding, routing and decoding.
``--check`` writes nothing: it compares with what is committed and fails where something got worse. No driver is touched.

The whole is more than a thousand programs, about twenty minutes of two cores. Parts 1 to 15 have every program once an
architecture each, at head dimensions and dtypes that go round from part to part; all of them together are the whole.
``--check`` alone is of part 1; ``--part all``, or naming dtypes, dimensions or programs, is of all that these name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from tests.benchmarks.compiled.recall import recall_programs
from unfold.kernels.common.launch import HEAD_DIMS
from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed import backward, forward
from unfold.kernels.compressed.tiles import Tiles, choose_tiles
from unfold.kernels.compressed.triton import SUM_ROWS

ARCHITECTURES = {"sm_80": (80, "sm_80"), "sm_90": (90, "sm_90a"), "sm_100": (100, "sm_100a")}  # capability, ptxas name
# Bytes a program can have; for sm_80 what sm_86 and sm_89 have, which use the same tiles (an A100 has 166912).
SHARED_LIMIT = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448}
# Bytes per thread, stores and loads together. 16 bits: tiles of d_k and d_v whose sums spill a little are the fastest that were
# measured (docs/performance.md); what spills more is not. fp32 products run without tensor cores, each thread holding whole
# rows of its operands: at head dimension 256 no tile is small enough; these kernels are for exactness, not speed.
SPILL_LIMIT = {"bf16": 600, "fp16": 600, "fp32": 1500}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
COMBINATIONS = tuple(itertools.product(HEAD_DIMS, DTYPES))
PARTS = len(COMBINATIONS)
Job = tuple[str, str, str, int, str]  # op, architecture, program, head dimension, dtype
HEADS, KV_HEADS, SEGMENTS = 32, 8, 4  # two gist levels; the number of segments changes nothing but a short unrolled loop
VERSION = f"triton {triton.__version__}"
TABLE = Path(__file__).parents[3] / "docs" / "benchmarks" / "compressed_aot"
RECALL_TABLE = TABLE.parent / "recall_aot"
TITLES = {TABLE.name: "Compressed attention", RECALL_TABLE.name: "Selection, unfolding, routing, decoding"}
_FP32 = {"p_shift", "p_factor", "p_mean", "p_copy_k", "p_copy_v", "p_part_k", "p_part_v"}
_INT32 = {"p_lo", "p_hi", "p_plan", "p_items", "p_sums", "p_copy_of"}


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes, per thread (registers, spills) or per program (shared memory)."""

    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int

    def worse_than(self, other: Report) -> list[str]:
        """The figures that grew, in words; a different tile is no reason to look away."""
        names = ("registers", "spill_bytes", "shared_bytes")
        return [f"{n} {getattr(other, n)} -> {getattr(self, n)}" for n in names if getattr(self, n) > getattr(other, n)]

    def excess(self, arch: str, dtype: str) -> list[str]:
        """The stated bounds that are broken, in words."""
        errors = []
        if self.spill_bytes > SPILL_LIMIT[dtype]:
            errors.append(f"spills {self.spill_bytes} bytes, more than {SPILL_LIMIT[dtype]}")
        if self.shared_bytes > SHARED_LIMIT[arch]:
            errors.append(f"{self.shared_bytes} bytes of shared memory, {arch} has {SHARED_LIMIT[arch]}")
        return errors


def programs(tiles: Tiles) -> dict[str, tuple[triton.JITFunction, Tile, dict]]:
    """Every program that forward and backward launch: name -> kernel, tile, compile-time flags of its own."""
    return {
        "forward": (forward.forward_kernel, tiles.forward, {}),
        "d_query": (backward.d_query_kernel, tiles.d_query, {}),
        "d_key top": (backward.d_key_kernel, tiles.top, dict(COPIES=True, APART=False)),
        "d_key local": (backward.d_key_kernel, tiles.local, dict(COPIES=True, APART=False)),
        "d_key sink": (backward.d_key_kernel, tiles.sink, dict(COPIES=True, APART=False)),
        "sum_parts": (backward.sum_parts_kernel, Tile(SUM_ROWS, tiles.top.keys, 4, 3), dict(SINK=False, COPIES=True)),
        "sum_parts sink": (backward.sum_parts_kernel, Tile(SUM_ROWS, tiles.sink.keys, 4, 3), dict(SINK=True, COPIES=True)),
    }


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its tile, what Triton made of it, and the assembler's name of the architecture."""

    tile: Tile
    kernel: CompiledKernel
    ptxas_name: str

    def report(self) -> Report:
        """What it takes."""
        registers, spill = _registers(self.kernel.asm["ptx"], self.ptxas_name)
        return Report(describe(self.tile), registers, spill, self.kernel.metadata.shared)


@dataclass(frozen=True)
class Source:
    """A kernel with its compile-time sizes and types, before it is compiled."""

    arch: str
    tile: Tile
    ast: ASTSource

    @property
    def identity(self) -> tuple:
        """All that the compiled program hangs on: sources with the same one compile to the same program."""
        return self.arch, self.tile.warps, self.tile.stages, self.ast.hash()

    def compile(self) -> Compiled:
        """Compile it."""
        capability, ptxas_name = ARCHITECTURES[self.arch]
        target = GPUTarget("cuda", capability, 32)
        options = dict(num_warps=self.tile.warps, num_stages=self.tile.stages)
        return Compiled(self.tile, triton.compile(self.ast, target=target, options=options), ptxas_name)


def program_source(arch: str, name: str, dim: int, dtype: str, tile: Tile | None = None) -> Source:
    """One program of :func:`programs` for 32/8 heads; ``tile`` replaces the table's."""
    block_dim = triton.next_power_of_2(dim)
    kernel, table_tile, flags = programs(choose_tiles(arch, block_dim, DTYPES[dtype]))[name]
    tile = tile or table_tile
    sizes = dict(
        H=HEADS, HKV=KV_HEADS, D=dim, BD=block_dim, S=SEGMENTS, BM=tile.rows, BN=tile.keys, BR=tile.rows, UPCAST=False,
        EXACT=dtype == "fp32", **flags,
    )  # fmt: skip
    return kernel_source(arch, kernel, tile, sizes, lambda name: _type(name, dtype))


def recall_source(arch: str, name: str, dim: int, dtype: str, tile: Tile | None = None) -> Source:
    """One program of :func:`recall_programs`; ``tile`` replaces warps and stages of its own."""
    program = recall_programs(arch, dim, dtype, DTYPES[dtype], HEADS, KV_HEADS)[name]
    sizes = {n: x for n, x in program.sizes.items() if n in program.kernel.arg_names}
    return kernel_source(arch, program.kernel, tile or program.tile, sizes, lambda n: program.type_of(n, dtype))


def kernel_source(arch: str, kernel: triton.JITFunction, tile: Tile, sizes: dict, type_of: Callable[[str], str]) -> Source:
    """A kernel with these compile-time sizes; ``type_of`` names the type of every other argument."""
    constants = {n: sizes[n] for n in kernel.arg_names if n in sizes}
    signature = {n: "constexpr" if n in sizes else type_of(n) for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n.startswith("p_")}
    return Source(arch, tile, ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned))


def describe(tile: Tile) -> str:
    """A tile as the table names it."""
    return f"{tile.rows}x{tile.keys}, {tile.warps} warps, {tile.stages} stages"


def _type(name: str, dtype: str) -> str:
    if not name.startswith("p_"):
        return "fp32" if name in ("scale", "d_scale") else "i32"
    return "*" + ("fp32" if name in _FP32 else "i32" if name in _INT32 else "i64" if name == "p_rows" else dtype)


def _registers(ptx: str, ptxas_name: str) -> tuple[int, int]:
    """Registers and spilled bytes (stores and loads together) per thread, as the assembler reports them."""
    nvidia = triton.knobs.nvidia
    ptxas = nvidia.ptxas_blackwell if ptxas_name.startswith("sm_1") else nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas.path, "-v", f"--gpu-name={ptxas_name}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
    return int(re.search(r"Used (\d+) registers", text)[1]), int(stores) + int(loads)


def key_of(arch: str, name: str, dim: int, dtype: str) -> str:
    """The name of one entry of the table."""
    return f"{arch} | {name} | {dim} | {dtype}"


def load_table(path: Path = TABLE) -> tuple[str, dict[str, Report]]:
    """What the committed table was made with, and its entries; none if there is no table."""
    file = path.with_suffix(".json")
    if not file.exists():
        return VERSION, {}
    content = json.loads(file.read_text())
    return content["made_with"], {k: Report(**v) for k, v in content["programs"].items()}


def write_table(table: dict[str, Report], path: Path = TABLE) -> None:
    """Write the table as JSON and as a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {k: asdict(table[k]) for k in sorted(table)}
    path.with_suffix(".json").write_text(json.dumps({"made_with": VERSION, "programs": entries}, indent=1) + "\n")
    lines = [
        f"# {TITLES[path.name]}: what the compiled kernels take",
        "",
        f"Made by `python -m tests.benchmarks.compiled` with {VERSION}, for {HEADS}/{KV_HEADS} heads, two levels, without a GPU.",
        "Registers and spilled bytes per thread (255 registers is the limit), shared memory in bytes per program.",
        "",
        "| arch | kernel | head dim | dtype | tile (rows x keys) | registers | spills | shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k, r in sorted(table.items(), key=lambda item: _order(item[0])):
        lines.append(f"| {k} | {r.tile} | {r.registers} | {r.spill_bytes} | {r.shared_bytes} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _order(key: str) -> tuple:
    arch, name, dim, dtype = key.split(" | ")
    return int(arch[3:]), int(dim), dtype, name


def check(key: str, report: Report, committed: tuple[str, dict[str, Report]]) -> list[str]:
    """What is wrong with a report: a bound broken, nothing committed, or worse than what is committed.

    The last only with the compiler that made the table: another one allocates registers differently.
    """
    arch, *_, dtype = key.split(" | ")
    made_with, table = committed
    errors = report.excess(arch, dtype)
    if key not in table:
        errors.append("not in the committed table")
    elif made_with == VERSION:
        errors += report.worse_than(table[key])
    return [f"{key}: {e}" for e in errors]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=("compressed", "recall"), default=["compressed", "recall"])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=["sm_80", "sm_90"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all")
    parser.add_argument("--dim", nargs="+", type=int, choices=HEAD_DIMS, help="default: all")
    parser.add_argument("--only", nargs="+", metavar="PROGRAM", help="names of programs, such as 'decode keep' (default all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument("--part", choices=("all", *map(str, range(1, PARTS + 1))), help="see above")
    parser.add_argument("--output", type=Path, default=TABLE.parent)
    args = parser.parse_args()
    chosen = args.dtype or args.dim or args.only
    part = args.part or ("1" if args.check and not chosen else "all")
    errors = []
    for op in args.ops:
        jobs = [job for job in jobs_of(op, args.arch, part) if _wanted(job, args)]
        errors += _compile_table(op, jobs, args)
    print(*errors, sep="\n", file=sys.stderr)
    return 1 if errors else 0


def jobs_of(op: str, architectures: Iterable[str], part: str = "all") -> list[Job]:
    """The entries of one table, or of one of its PARTS: every program once an architecture, at dims and dtypes that differ."""
    jobs = []
    for arch in architectures:
        for j, (dim, dtype) in enumerate(COMBINATIONS):
            for i, name in enumerate(names_of(op, arch, dim, dtype)):
                if part in ("all", str((i + j + list(ARCHITECTURES).index(arch)) % PARTS + 1)):
                    jobs.append((op, arch, name, dim, dtype))
    return jobs


def _wanted(job: Job, args: argparse.Namespace) -> bool:
    _, _, name, dim, dtype = job
    return all(not choice or x in choice for x, choice in ((name, args.only), (dim, args.dim), (dtype, args.dtype)))


def _compile_table(op: str, jobs: list[Job], args: argparse.Namespace) -> list[str]:
    """Compile these entries of one table in parallel and write it, unless ``--check``; what is wrong, in words."""
    path = args.output / (TABLE if op == "compressed" else RECALL_TABLE).name
    committed = load_table(path)
    table, errors = dict(committed[1]), []
    same: dict[tuple, list[Job]] = {}  # many kernels read neither keys nor values: one program for every dtype and dimension
    for job in jobs:
        same.setdefault(source_of(*job).identity, []).append(job)
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for group, report in zip(same.values(), pool.imap(_compile, [group[0] for group in same.values()])):
            for job in group:
                key = key_of(*job[1:])
                table[key] = replace(report, tile=describe(source_of(*job).tile))
                errors += check(key, table[key], committed if args.check else (VERSION, table))
                print(f"{key}: {table[key]}", flush=True)
    if not args.check:
        write_table({k: r for k, r in table.items() if k in _served(op)}, path)
    return errors


def names_of(op: str, arch: str, dim: int, dtype: str) -> list[str]:
    """The programs of one table at an architecture, head dimension and dtype."""
    if op == "compressed":
        return list(programs(choose_tiles(arch, triton.next_power_of_2(dim), DTYPES[dtype])))
    return list(recall_programs(arch, dim, dtype, DTYPES[dtype], HEADS, KV_HEADS))


def _served(op: str) -> set[str]:
    """The entries that a whole table has: those of programs that are no more are dropped."""
    return {key_of(*job[1:]) for job in jobs_of(op, ARCHITECTURES)}


def _compile(job: Job) -> Report:
    return source_of(*job).compile().report()


def source_of(op: str, arch: str, name: str, dim: int, dtype: str) -> Source:
    """A program of one of the tables."""
    return (program_source if op == "compressed" else recall_source)(arch, name, dim, dtype)
