"""What benchmarks/kernel_loops.py reads off a disassembly, and off the one of the last build."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.kernel_loops import Loop, built_engines, disassemble, loops

DISASSEMBLY = """
0000000000000000 <sample<float>>:
   0:\tvmovaps (%rcx,%rax,1),%zmm0
   7:\tvfmadd231ps (%rdx,%rax,1),%zmm0,%zmm2
   e:\tvmovq  %xmm11,%rbx
  15:\tmov    0x8(%rsp),%r9
  19:\tvmovaps %zmm2,(%rbx)
  20:\tadd    $0x40,%rax
  24:\tcmp    %rax,%rsi
  27:\tjne    0 <sample<float>>
  29:\tsub    $0x1,%rdi
  2d:\tjne    0 <sample<float>>
  2f:\tret
"""


def test_innermost_loop_with_its_spills() -> None:
    assert list(loops(DISASSEMBLY)) == [
        Loop("sample<float>", 1, 2, stack=1, moves=1, instructions=8)
    ]


def test_the_weight_gradient_spills_nothing() -> None:
    """The AVX-512 loops over neighbouring positions, where every convolution of stride 1 spends
    its time, keep all sums and addresses in registers."""
    engines = built_engines("kAvx512")
    if not engines:
        pytest.skip("no build of the AVX-512 engine is here")
    if shutil.which("objdump") is None:
        pytest.skip("no objdump (binutils)")
    named = [loop for loop in loops(disassemble(engines[0])) if "sample<float" in loop.function]
    found = [loop for loop in named if ", 64l>" in loop.function]
    assert {loop.function.partition("<")[2].partition(">")[0] for loop in found} >= {
        *(f"float, 1, {count}, 64l" for count in range(1, 11)),
        *(f"float, 4, {count}, 64l" for count in range(1, 7)),
    }
    assert [loop for loop in found if loop.stack or loop.moves] == []
    # Strides need one more address, which may not fit.
    assert [loop for loop in named if loop.moves or loop.stack > 1] == []
