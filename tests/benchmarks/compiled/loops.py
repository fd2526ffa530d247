"""Machine instructions of the kernels' innermost loops, by kind, counted in compiled code without a GPU.

    python -m tests.benchmarks.compiled.loops [--ops compressed recall] [--arch sm_90] [--dim 128] [--dtype bf16] [--output FILE]

Each program is compiled as for tests.benchmarks.compiled and disassembled. A loop is what lies between a backward branch and its
target; innermost are those with no other loop in them. One turn of such a loop works on one tile, so that the figures are
instructions per tile of each warp. Where the branch stands in the source is said beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from tests.benchmarks.compiled.tables import ARCHITECTURES, DTYPES, HEADS, KV_HEADS, VERSION, describe, names_of, source_of
from unfold.kernels.common.launch import HEAD_DIMS

# Kinds by the beginnings of the opcodes; what is of none computes addresses, masks and numbers.
KINDS = {
    "tensor cores": ("HMMA", "HGMMA", "IMMA", "QGMMA", "DMMA", "WARPGROUP"),
    "device memory": ("LDG", "STG", "LDGSTS", "ATOM", "RED", "UBLKCP", "UTMA", "LDL", "STL", "CCTL", "MEMBAR"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM", "MOVM"),
    "exp, division": ("MUFU",),
    "between threads": ("SHFL", "VOTE", "MATCH", "REDUX"),
    "waiting": ("BAR", "DEPBAR", "LDGDEPBAR", "SYNCS", "WARPSYNC", "NANOSLEEP", "ELECT", "FENCE"),
}
SHORTEST = 16  # a shorter loop is a trap behind the end, or counts something


@dataclass(frozen=True)
class Loop:
    """An innermost loop: where its branch stands, and its instructions by kind, ``others`` included."""

    where: str
    counts: Counter

    @property
    def instructions(self) -> int:
        """Of all kinds."""
        return self.counts.total()


def loops(assembly: str) -> list[Loop]:
    """The innermost loops in the text of ``nvdisasm -g -c``, in the order of their ends."""
    labels, opcodes, lines, branches, line = {}, [], [], [], ""
    for text in assembly.splitlines():
        if found := re.search(r'//## File "([^"]+)", line (\d+)', text):
            line = f"{'/'.join(Path(found[1]).parts[-2:])}:{found[2]}"
        elif found := re.match(r"(\.L_\w+):", text):
            labels[found[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)[^`;]*(?:`\((\.L_\w+)\))?", text):
            if found[1] == "BRA" and labels.get(found[2], len(opcodes)) < len(opcodes):
                branches.append((labels[found[2]], len(opcodes)))
            opcodes.append(found[1])
            lines.append(line)
    inner = [(a, b) for a, b in branches if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in branches)]
    return [Loop(lines[b], Counter(map(kind, opcodes[a : b + 1]))) for a, b in inner if b + 1 - a >= SHORTEST]


def kind(opcode: str) -> str:
    """The kind of an instruction."""
    return next((name for name, begins in KINDS.items() if opcode.startswith(begins)), "others")


def disassembled(cubin: bytes) -> str:
    """The machine code of a compiled kernel, as text with the lines of its source."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-g", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _count(job: tuple[str, str, str, int, str]) -> tuple[tuple, str, list[Loop]]:
    compiled = source_of(*job).compile()
    return job, describe(compiled.tile), loops(disassembled(compiled.kernel.asm["cubin"]))


def table(found: list[tuple[tuple, str, list[Loop]]]) -> list[str]:
    """Lines of Markdown."""
    kinds = [*KINDS, "others"]
    lines = [f"| arch | kernel | head dim | dtype | tile | loop ends at | instructions | {' | '.join(kinds)} |"]
    lines.append("|" + "---|" * (7 + len(kinds)))
    for (_, arch, name, dim, dtype), tile, inner in found:
        for loop in inner:
            figures = (loop.instructions, *(loop.counts[k] for k in kinds))
            lines.append(f"| {' | '.join(map(str, (arch, name, dim, dtype, tile, loop.where, *figures)))} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=("compressed", "recall"), default=["compressed", "recall"])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=["sm_90"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--dim", nargs="+", type=int, choices=HEAD_DIMS, default=[128])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/loops.md"))
    args = parser.parse_args()
    where = [(a, d, t) for a in args.arch for d in args.dim for t in args.dtype]
    jobs = [(op, a, name, d, t) for op in args.ops for a, d, t in where for name in names_of(op, a, d, t)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        found = pool.map(_count, jobs, chunksize=1)
    lines = [
        "# Instructions of the innermost loops",
        "",
        f"Made by `python -m tests.benchmarks.compiled.loops` with {VERSION}, for {HEADS}/{KV_HEADS} heads, without a GPU: what",
        "each warp executes in one turn of an innermost loop, which works on one tile; loads of the next tiles are among it. Of",
        "kernels with two loops over keys the first visits full tiles, without a mask, the second the rest.",
        "",
        *table(found),
    ]
    args.output.write_text("\n".join(lines) + "\n")
    print(*table(found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
