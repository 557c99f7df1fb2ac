"""Mistakes planted in Triton kernels, in the source and in what is compiled: each is found."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from ptx_machine import AbsentLane, Deadlock, Misaligned, OutOfBounds, PtxError, Race, Uninitialised

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language")
HEAD = "import triton\nimport triton.language as tl\n\n\n"


@triton.jit
def product_kernel(a, b, c, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """c = a @ b, a [32, n], b [n, N]; a program computes M rows."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, n, K):
        k = first + tl.arange(0, K)
        left = tl.load(a + row[:, None] * n + k, mask=k < n, other=0.0)
        right = tl.load(b + k[:, None] * N + column, mask=k[:, None] < n, other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + row[:, None] * N + column, total.to(c.dtype.element_ty))


@triton.jit
def sum_kernel(x, partial, n, BLOCK: tl.constexpr):
    """partial[program] = the sum of the program's part of x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(partial + tl.program_id(0), tl.sum(value))


@triton.jit
def count_kernel(x, bins, n, BLOCK: tl.constexpr):
    """bins[v] += how often v is in x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    value = tl.load(x + i, mask=here, other=0)
    tl.atomic_add(bins + value, 1, mask=here)


@triton.jit
def move_kernel(x, y, start, n, BLOCK: tl.constexpr):
    """y[i] = x[start + i]"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + start + i, mask=i < n), mask=i < n)


def product(kernel) -> None:
    generator = torch.Generator().manual_seed(0)
    # The last rows are at the end of their buffers.
    a, b = torch.randn(32, 100, generator=generator), torch.randn(100, 32, generator=generator)
    c = torch.full((32, 32), torch.nan, dtype=torch.float16)
    kernel[(1,)](a.half(), b.half(), c, 100, 32, 32, 32, num_warps=4, num_stages=3)
    exact = a.half().double() @ b.half().double()
    assert ((c.double() - exact).abs() < 0.05).all()


def total(kernel) -> None:
    x = torch.arange(300.0)
    partial = torch.full((3,), torch.nan)
    kernel[(3,)](x, partial, 300, 128)
    assert partial.tolist() == [x[i : i + 128].sum() for i in (0, 128, 256)]


def counts(kernel) -> None:
    x = torch.arange(300, dtype=torch.int32) % 7
    bins = torch.zeros(7, dtype=torch.int32)
    kernel[(3,)](x, bins, 300, 128)
    assert torch.equal(bins, torch.bincount(x).int())


def move(kernel) -> None:
    x, y = torch.arange(544.0), torch.zeros(512)
    kernel[(3,)](x, y, 32, 512, 256, num_warps=2)
    assert torch.equal(y, x[32:])


CHECKS: dict[Callable[..., None], Any] = {
    product: product_kernel,
    total: sum_kernel,
    counts: count_kernel,
    move: move_kernel,
}
WRONG = AssertionError
# In the source: the check, what is changed, and how it must fail.
SOURCES: dict[str, tuple[Callable[..., None], str, str, type[Exception]]] = {
    "no mask along a row": (product, "* n + k, mask=k < n, other=0.0", "* n + k", OutOfBounds),
    "a mask that is one too wide": (product, "k[:, None] < n", "k[:, None] <= n", OutOfBounds),
    "a mask that is one too narrow": (product, "mask=k < n", "mask=k < n - 1", WRONG),
    "the wrong fill": (total, "other=0.0", "other=1.0", WRONG),
    "rows from one on": (product, "* M + tl", "* M + 1 + tl", OutOfBounds),
    "the wrong stride": (product, "k[:, None] * N", "k[:, None] * M * 2", OutOfBounds),
    "a step too few": (product, "range(0, n, K)", "range(0, n - K, K)", WRONG),
    "a sum that starts anew": (product, "right, total)", "right)", WRONG),
    "one place for all programs": (total, "partial + tl.program_id(0)", "partial", Race),
    "places that overlap": (move, "tl.program_id(0) * BLOCK", "tl.program_id(0) * 128", Race),
    "an update without atomics": (
        counts, "tl.atomic_add(bins + value, 1, mask=here)",
        "tl.store(bins + value, tl.load(bins + value, mask=here) + 1, mask=here)", Race,
    ),
    "an update of what is masked": (counts, "1, mask=here", "1", WRONG),
    "a promise that is not kept": (
        move, "x + start", "x + tl.multiple_of(start - 1, 4)", Misaligned,
    ),
    "no mask": (move, "tl.load(x + start + i, mask=i < n)", "tl.load(x + start + i)", OutOfBounds),
}  # fmt: skip


def function_of(text: str, name: str, folder: Path) -> Any:
    """Return a kernel from source that is not this file's."""
    path = folder / f"{name}.py"
    path.write_text(HEAD + text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.parametrize("name", SOURCES)
def test_mistakes_in_the_source(ptx, name: str, tmp_path: Path) -> None:
    check, before, after, failure = SOURCES[name]
    kernel = CHECKS[check]
    check(kernel)
    text = inspect.getsource(kernel.fn)
    assert text.count(before) == 1, "the planted text has to be there, once"
    mutant = function_of(text.replace(before, after), kernel.fn.__name__, tmp_path)
    with pytest.raises(failure) as found:
        check(mutant)
    if failure is not WRONG:
        assert f"{kernel.fn.__name__}.py:" in str(found.value), "the diagnosis says where"


# In the compiled code: the check, what is changed wherever it is, and how each must fail.
COMPILED: dict[str, tuple[Callable[..., None], str, str, tuple[type[PtxError], ...]]] = {
    "no barrier in a product": (product, r"bar\.sync\s+0;", "", (Race,)),
    "no barrier in a sum": (total, r"bar\.sync\s+0;", "", (Race, Uninitialised)),
    "no wait for a copy": (product, r"cp\.async\.wait_group\s+\d+;", "", (Race,)),
    "a copy that is in no group": (product, r"cp\.async\.commit_group;", "", (Race,)),
    "a matrix off by two bytes": (
        product, r"(ldmatrix[^;]*\[%r\d+)(\+\d+)?\]", r"\1+2]", (Misaligned,),
    ),
    "a matrix far away": (
        product, r"(ldmatrix[^;]*\[%r\d+)(\+\d+)?\]", r"\1+65536]", (OutOfBounds,),
    ),
    "a copy off by two bytes": (
        product, r"(cp\.async\.c[ag][^;]*\[ %rd\d+ \+ )0", r"\g<1>2", (Misaligned,),
    ),
    "half a warp shuffles": (total, r"(shfl\.sync[^;]*), -1;", r"\1, 65535;", (AbsentLane,)),
    "lanes leave before they shuffle": (
        total, r"(shfl\.sync)", r"{.reg .pred %q; .reg .b32 %l; mov.u32 %l, %laneid;"
        r" setp.eq.u32 %q, %l, 9; @%q ret;} \1", (AbsentLane,),
    ),
    "a shuffle under a condition": (
        total, r"(shfl\.sync)", r"@%p1 \1", (AbsentLane, Deadlock),
    ),
    "an element after the vector": (
        move, r"(ld\.global\.v\d\.b32 [^;]*\[ %rd\d+ \+ )0", r"\g<1>4", (Misaligned,),
    ),
    "no predicate": (move, r"@%p\d+ (st\.global)", r"\1", (OutOfBounds,)),
    "a read for an update": (
        counts, r"@(%p\d+) atom\.global\S+ (%r\d+), \[ (%rd\d+) \+ 0 \], (%r\d+);",
        r"@\1 ld.global.b32 \2, [\3]; @\1 st.global.b32 [\3], \4;", (Race,),
    ),
}  # fmt: skip
# Places that may be changed, as nothing relies on them.
SPARE = {"no barrier in a product": 1} if Version(triton.__version__) < Version("3.9") else {}


@pytest.mark.parametrize("name", COMPILED)
def test_mistakes_in_what_is_compiled(ptx, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place is changed by itself; none goes unnoticed but what the compiler could spare."""
    check, pattern, replacement, failures = COMPILED[name]
    kernel = CHECKS[check]
    texts: list[str] = []
    monkeypatch.setattr(ptx, "edit", lambda text: texts.append(text) or text)
    check(triton.JITFunction(kernel.fn))
    places = list(re.finditer(pattern, texts[-1]))
    assert places, "the planted text has to be there"
    unnoticed = 0
    for place in places:
        mutant = texts[-1][: place.start()] + place.expand(replacement) + texts[-1][place.end() :]
        monkeypatch.setattr(ptx, "edit", lambda text, mutant=mutant: mutant)
        try:
            check(triton.JITFunction(kernel.fn))
        except failures:
            continue
        unnoticed += 1
    assert unnoticed <= SPARE.get(name, 0)
