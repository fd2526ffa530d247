"""Instructions of innermost loops, counted in disassembled code."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.benchmarks.compiled.loops import disassembled, loops
from tests.benchmarks.compiled.tables import recall_source

NESTED = """
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
	//## File "/somewhere/kernels/op/file.py", line 7
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
.L_x_0:
{body}
	//## File "/somewhere/kernels/op/file.py", line 9
        /*00f0*/              @!P0 BRA `(.L_x_0) ;
        /*0100*/              @UP1 BRA `(.L_x_1) ;
.L_x_2:
        /*0110*/                   BRA `(.L_x_2);
"""
BODY = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8]", "LDGSTS.E [R3], desc[UR4][R2.64]", "LDS R5, [R6]", "MUFU.EX2 R7, R8"]
BODY += ["BAR.SYNC.DEFER_BLOCKING 0x0", "SHFL.BFLY PT, R1, R2"] + ["@P1 IADD3 R1, R2, R3"] * 10


def test_innermost_loops_by_kind():
    """What is outside of the inner loop does not count, nor does the trap behind the end."""
    body = "\n".join(f"        /*{i:04x}*/                   {text} ;" for i, text in enumerate(BODY))
    (loop,) = loops(NESTED.format(body=body))
    assert (loop.where, loop.instructions) == ("op/file.py:9", len(BODY) + 1)
    assert loop.counts == {
        "tensor cores": 1, "device memory": 1, "shared memory": 1, "exp, division": 1, "waiting": 1, "between threads": 1,
        "others": 11,
    }  # fmt: skip


def test_a_compiled_kernel():
    """The search for a bound holds the scores of its row: no device memory is read in the loop that halves the range."""
    found = loops(disassembled(recall_source("sm_90", "decode select below", 64, "bf16").compile().kernel.asm["cubin"]))
    search = next(loop for loop in found if loop.where.startswith("common/search.py"))
    assert search.instructions > 50 and search.counts["tensor cores"] == 0 and search.counts["device memory"] <= 1
