"""What a launch is counted to execute and to move, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_machine import Counts, Module
from ptx_machine.counts import kind, operations
from ptx_machine.parse import Instruction

# out[block * 64 + thread] = in[thread * stride] + 1, for threads below 40.
KERNEL = """
.version 8.0
.target sm_80
.visible .entry test(.param .u64 from, .param .u64 to, .param .u32 stride) {
  .reg .pred %p; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<3>;
  ld.param.u64 %rd0, [from];
  ld.param.u64 %rd1, [to];
  ld.param.u32 %r0, [stride];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  setp.ge.u32 %p, %r1, 40;
  @%p bra DONE;
  mul.lo.u32 %r3, %r1, %r0;
  mad.wide.u32 %rd2, %r3, 4, %rd0;
  ld.global.f32 %f0, [%rd2];
  add.f32 %f1, %f0, 0f3F800000;
  shl.b32 %r4, %r2, 6;
  add.u32 %r4, %r4, %r1;
  mad.wide.u32 %rd3, %r4, 4, %rd1;
  st.global.f32 [%rd3], %f1;
  DONE: ret;
}
"""
BLOCKS, THREADS, BUSY = 2, 64, 40


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4 + 1), (2, 8 + 2), (8, 32 + 8)])
def test_a_kernel(stride: int, sectors: int) -> None:
    given = np.zeros(THREADS * stride, np.float32)
    made = np.zeros(BLOCKS * THREADS, np.float32)
    kernel = Module(KERNEL)["test"]
    arguments = kernel.arguments(given.ctypes.data, made.ctypes.data, stride)
    buffers = [(a.ctypes.data, a.nbytes) for a in (given, made)]
    counts = kernel.launch((BLOCKS,), (THREADS,), arguments, buffers)
    warps = BLOCKS * THREADS // 32  # the last 8 threads that are busy are of the second warp
    assert counts.instructions == {
        **{"parameters": 3 * warps, "integer": (3 + 5) * warps},
        # Lanes that have parted return by themselves.
        "control": 2 * warps + BLOCKS,
        **{"global": 2 * warps, "float": warps},
    }
    assert counts.flops == BLOCKS * BUSY
    assert counts.asked == BLOCKS * BUSY * 2 * 4
    assert counts.read == BLOCKS * sectors * 32
    assert counts.read_once == sectors * 32  # both blocks read the same
    assert counts.written == counts.written_once == BLOCKS * 5 * 32
    assert counts.coalesced == counts.asked / (counts.read + counts.written)


def test_launches_add_up() -> None:
    one = Counts(flops=3, read=32)
    one.instructions["float"] = 2
    two = one + one
    assert (two.flops, two.read, two.instructions["float"]) == (6, 64, 4)
    assert Counts().coalesced == 1


def _instruction(text: str) -> Instruction:
    op, *modifiers = text.split(".")
    return Instruction(text, op, modifiers, [], None, False, "")


@pytest.mark.parametrize(
    ("text", "expected", "flops"),
    [
        ("fma.rn.f32", "float", (2, 0)),
        ("fma.rn.bf16x2", "float", (4, 0)),
        ("mul.lo.u32", "integer", (0, 0)),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "tensor", (0, 4096)),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "tensor", (0, 2048)),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared", (0, 0)),
        ("cp.async.cg.shared.global", "global", (0, 0)),
        ("cp.async.wait_group", "together", (0, 0)),
        ("st.shared.v4.b32", "shared", (0, 0)),
        ("bar.sync", "together", (0, 0)),
        ("bra.uni", "control", (0, 0)),
    ],
)
def test_classes(text: str, expected: str, flops: tuple[int, int]) -> None:
    instruction = _instruction(text)
    assert kind(instruction) == expected
    assert operations(instruction) == flops
