"""ldmatrix and mma of the PTX machine: the layouts of the PTX manual, products as in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_machine import AbsentLane, Module, OutOfBounds, Unsupported
from torch import Tensor

WARPS = 2
THREADS = 32 * WARPS


def execute(body: str, inputs: list[np.ndarray], outputs: int) -> np.ndarray:
    """Load the words of each thread, [threads, words], into %i, run, and return those in %o."""
    given = np.ascontiguousarray(np.concatenate(inputs, axis=1).view(np.uint32))
    out = np.zeros((THREADS, outputs), np.uint32)
    loads = "".join(f"ld.global.b32 %i{j}, [%rd1+{4 * j}];" for j in range(given.shape[1]))
    stores = "".join(f"st.global.b32 [%rd2+{4 * j}], %o{j};" for j in range(outputs))
    text = f""".version 8.0\n.target sm_80
        .visible .entry test(.param .u64 in, .param .u64 out) {{
            .reg .pred %p<3>; .reg .b32 %i<20>; .reg .b32 %o<20>; .reg .b32 %r<9>; .reg .b64 %rd<3>;
            .shared .align 16 .b8 tiles[1024];
            ld.param.u64 %rd1, [in]; ld.param.u64 %rd2, [out]; mov.u32 %r0, %tid.x;
            mad.wide.u32 %rd1, %r0, {4 * given.shape[1]}, %rd1;
            mad.wide.u32 %rd2, %r0, {4 * outputs}, %rd2;
            mov.u32 %r1, tiles; and.b32 %r2, %r0, 31; {loads} {body} {stores} ret; }}"""
    kernel = Module(text)["test"]
    buffers = [(x.ctypes.data, x.nbytes) for x in (given, out)]
    kernel.launch((1,), (THREADS,), kernel.arguments(*(b[0] for b in buffers)), buffers)
    return out


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_are_dealt_out(count: int, trans: str) -> None:
    """Lane l gets of every 8 x 8 matrix the elements 2 (l % 4) and the next of row l / 4."""
    matrices = np.random.default_rng(0).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    rows = np.tile(matrices.reshape(32, 8), (WARPS, 1))  # thread t stores row t % 32
    names = ", ".join(f"%o{i}" for i in range(count))
    body = f"""shl.b32 %r3, %r2, 4; add.u32 %r3, %r1, %r3; setp.lt.u32 %p0, %r0, 32;
        @%p0 st.shared.v4.b32 [%r3], {{%i0, %i1, %i2, %i3}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r3];"""
    found = execute(body, [rows.view(np.uint32)], count).view(np.uint16)
    for t in range(THREADS):
        row, column = t % 32 // 4, 2 * (t % 4)
        for i in range(count):
            matrix = matrices[i].T if trans else matrices[i]
            assert found[t, 2 * i : 2 * i + 2].tolist() == matrix[row, column : column + 2].tolist()


def fragments(x: Tensor, rows: list[int], columns: list[int], per: int) -> np.ndarray:
    """Return [32, registers] words; register i of lane l begins at (rows[i](l), columns[i](l))."""
    words = [[x[r(lane), c(lane) : c(lane) + per] for r, c in zip(rows, columns, strict=True)]
             for lane in range(32)]  # fmt: skip
    stacked = torch.stack([torch.cat([part.contiguous() for part in w]) for w in words])
    if stacked.element_size() == 2:
        return stacked.view(torch.int16).numpy().view(np.uint32)
    return stacked.numpy().view(np.uint32)


def operands(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Deal a [16, k] and b [k, 8] out as the manual says for m16n8k*."""
    per = 4 // a.element_size()
    rows, columns = [], []
    for step in range(a.shape[1] // (4 * per)):
        for upper in (0, 8):
            rows.append(lambda lane, upper=upper: lane // 4 + upper)
            columns.append(lambda lane, step=step: lane % 4 * per + 4 * per * step)
    of_a = fragments(a, rows, columns, per)
    half = rows[::2]
    of_b = fragments(b.T.contiguous(), [lambda lane: lane // 4] * len(half), columns[::2], per)
    return of_a, of_b


SHAPES = {
    "m16n8k16.row.col.f32.f16.f16.f32": (torch.float16, 16),
    "m16n8k8.row.col.f32.f16.f16.f32": (torch.float16, 8),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 16),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 8),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (torch.float32, 8),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (torch.float32, 4),
    "m16n8k16.row.col.f16.f16.f16.f16": (torch.float16, 16),
}


def instruction(shape: str, counts: list[int]) -> str:
    start, groups = 0, []
    for count in counts:
        groups.append("{" + ", ".join(f"%i{start + i}" for i in range(count)) + "}")
        start += count
    target = "{" + ", ".join(f"%o{i}" for i in range(counts[-1])) + "}"
    return f"mma.sync.aligned.{shape} {target}, {', '.join(groups)};"


@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: str) -> None:
    dtype, depth = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    total = torch.float16 if ".f16.f16.f16.f16" in shape else torch.float32
    a = torch.randn(WARPS, 16, depth, generator=generator).to(dtype)
    b = torch.randn(WARPS, depth, 8, generator=generator).to(dtype)
    c = torch.randn(WARPS, 16, 8, generator=generator).to(total)
    if dtype is torch.float32:  # of the bits that TF32 does not have nothing may be seen
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    dealt = [operands(*pair) for pair in zip(a, b, strict=True)]
    noise = 0x1A5A if dtype is torch.float32 else 0
    of_a, of_b = (np.concatenate([d[i] for d in dealt]) | np.uint32(noise) for i in (0, 1))
    rows, columns = (
        [lambda lane: lane // 4, lambda lane: lane // 4 + 8],
        [lambda lane: lane % 4 * 2] * 2,
    )
    of_c = np.concatenate([fragments(x, rows, columns, 2) for x in c])
    counts = [x.shape[1] for x in (of_a, of_b, of_c)]
    found = execute(instruction(shape, counts), [of_a, of_b, of_c], counts[-1])
    exact = (a.double() @ b.double() + c.double()).to(total)
    expected = np.concatenate([fragments(x, rows, columns, 2) for x in exact])
    assert np.array_equal(found, expected)


def test_rows_have_to_be_in_shared_memory_and_lanes_together() -> None:
    load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%o0}, [%r3];"
    nothing = [np.zeros((THREADS, 1), np.uint32)]
    with pytest.raises(OutOfBounds):
        execute("shl.b32 %r3, %r2, 8;" + load, nothing, 1)
    with pytest.raises(AbsentLane):
        execute("mov.u32 %r3, 0; setp.lt.u32 %p0, %r2, 8; @%p0 " + load, nothing, 1)


def test_shapes_that_are_not_known_are_refused() -> None:
    with pytest.raises(Unsupported, match="mma"):
        execute(
            instruction("m16n8k32.row.col.s32.s8.s8.s32", [4, 2, 4]),
            [np.zeros((THREADS, 10), "u4")],
            4,
        )
