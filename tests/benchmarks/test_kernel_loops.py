"""What benchmarks/kernel_loops.py reads off a disassembly."""

from __future__ import annotations

from benchmarks.kernel_loops import Loop, loops

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
