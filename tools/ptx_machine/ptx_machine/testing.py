"""A few instructions run on arrays, one element a thread: for tests of single instructions."""

from __future__ import annotations

import numpy as np

from . import Module

N = 256
DTYPES = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype_of(type_: str) -> np.dtype:
    return np.dtype(f"{DTYPES[type_[0]]}{int(type_[1:]) // 8}")


def execute(body: str, inputs: list[np.ndarray], out: np.dtype) -> np.ndarray:
    """Run instructions on registers %a0, %a1, ... of every thread; return what is in %d."""
    result = np.zeros(N, out)
    arrays = [np.ascontiguousarray(x) for x in inputs]
    loads, registers, parameters = "", "", [".param .u64 out"]
    for i, x in enumerate(arrays):
        size = x.dtype.itemsize
        parameters.append(f".param .u64 in{i}")
        registers += f".reg .b{max(8 * size, 16)} %a{i};\n"
        loads += f"""ld.param.u64 %at, [in{i}];
            mad.wide.u32 %at, %t, {size}, %at;
            ld.global.b{8 * size} %a{i}, [%at];\n"""
    text = f""".version 8.0\n.target sm_80
        .visible .entry test({", ".join(parameters)}) {{
            .reg .pred %p<4>; .reg .b32 %t; .reg .b64 %at; .reg .b{8 * out.itemsize} %d;
            {registers} mov.u32 %t, %tid.x;
            {loads} {body}
            ld.param.u64 %at, [out];
            mad.wide.u32 %at, %t, {out.itemsize}, %at;
            st.global.b{8 * out.itemsize} [%at], %d;
            ret;
        }}"""
    kernel = Module(text)["test"]
    buffers = [(x.ctypes.data, x.nbytes) for x in (result, *arrays)]
    kernel.launch((1,), (N,), kernel.arguments(*(b[0] for b in buffers)), buffers)
    return result


def integers(type_: str, seed: int) -> np.ndarray:
    """Return random numbers of all sizes, and the extremes."""
    dtype = dtype_of(type_)
    random = np.random.default_rng(seed)
    bits = 8 * dtype.itemsize
    x = random.integers(0, 1 << bits, N, np.uint64, endpoint=False) if bits < 64 else (
        random.integers(0, (1 << 64) - 1, N, np.uint64, endpoint=True)
    )  # fmt: skip
    x >>= random.integers(0, bits, N).astype(np.uint64)
    x[random.permutation(N)[:40]] = [0, 1, 2, 3, (1 << bits) - 1] * 8
    x[random.permutation(N)[:20]] = [1 << (bits - 1), (1 << (bits - 1)) - 1] * 10
    return x.astype(f"u{dtype.itemsize}").view(dtype)
