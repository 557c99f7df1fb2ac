"""The CUDA kernels compiled for the CPU, and the backend "cuda" on CPU tensors by way of them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_emulation
import pytest
import semi_structured_kernels
import torch
from cuda_emulation import ROOT, SOURCES, Emulated, OnPtx, bound, module_of, on_the_cpu

import sparsekd as skd
from sparsekd import _torch
from sparsekd.ops import cuda
from sparsekd.ops.dispatch import backends

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Set in a process that runs under sanitizers, see test_sanitizers.py and test_races.py.
SANITIZED = {"1": SANITIZERS, "thread": ("-fsanitize=thread",)}.get(
    os.environ.get("SPARSEKD_EMULATION_SANITIZED", ""), ()
)

Compile = Callable[..., Path]


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("needs g++")
    return found


@pytest.fixture(scope="session")
def compile_for_the_cpu(compiler: str) -> Compile:
    """Return a function that compiles a .cu file with g++."""
    return cuda_emulation.compile_for_the_cpu


@pytest.fixture(scope="session")
def compile_to_ptx() -> Compile:
    """Return a function that compiles a .cu file with nvcc, for the machine that executes PTX."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    return cuda_emulation.compile_to_ptx


@pytest.fixture(scope="session")
def sanitizers(compiler: str) -> tuple[str, ...]:
    """Return the flags of AddressSanitizer and UndefinedBehaviorSanitizer."""
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if not os.path.isabs(found):
            pytest.skip(f"the compiler comes without {name}")
    return SANITIZERS


@pytest.fixture(scope="session")
def emulated(compile_for_the_cpu: Compile) -> Emulated:
    """Return the library of CUDA kernels, compiled for the CPU."""
    return Emulated(compile_for_the_cpu(SOURCES / "kernels.cu", "-O1", "-shared", *SANITIZED))


@pytest.fixture(scope="session")
def emulated_module(emulated: Emulated) -> ModuleType:
    """Return a second copy of sparsekd.ops.cuda.ops, bound to the emulated library."""
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    return module_of(emulated)


@pytest.fixture
def bind(emulated_module: ModuleType) -> Iterator[Callable[[Emulated], None]]:
    """Return a function that lets the backend "cuda" and topologies call a library."""
    with ExitStack() as stack:
        yield lambda library: stack.enter_context(bound(emulated_module, library))


@pytest.fixture
def on_cuda(
    emulated: Emulated, emulated_module: ModuleType, bind: Callable[[Emulated], None]
) -> Iterator[Emulated]:
    """Run the test on the backend "cuda", topologies too, on CPU tensors.

    Sums are made a second time only where a test expects it, and asks: so what reads shared memory
    that nobody has written, which is NaN, does not get away with it.
    """
    bind(emulated)
    emulated.set_order("forward")
    emulated.repeats()
    with on_the_cpu("cuda", module=emulated_module.__name__):
        yield emulated
    assert emulated.repeats() == 0, "sums of finite numbers were not finite"


@pytest.fixture
def ptx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let Triton's launchers run on CPU tensors, see triton_driver; the driver logs launches."""
    pytest.importorskip("triton", reason="needs Triton")
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("Triton interprets in this process instead of compiling")
    from triton_driver import PtxDriver, installed

    # Ours, so that nothing is compiled twice; contractions as Triton has done them up to now.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    with installed(PtxDriver()) as driver:
        yield driver


@pytest.fixture
def on_triton(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Counter[str]]:
    """Run the test on the backend "triton", on CPU tensors; count the launches of its products.

    Triton's interpreter runs the kernels where TRITON_INTERPRET is set, else their PTX is executed.
    """
    pytest.importorskip("triton", reason="needs Triton")
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    from triton_backend import LAUNCHES, counting, float32_products

    if "TRITON_INTERPRET" not in os.environ:
        request.getfixturevalue("ptx")
    from sparsekd.ops.triton import launch as triton_launch

    launches: Counter[str] = Counter()
    for name in LAUNCHES:
        launch = getattr(triton_launch, name)
        monkeypatch.setattr(triton_launch, name, counting(launches, name, launch))
    with on_the_cpu("triton"), float32_products("ieee"):
        yield launches
    monkeypatch.undo()
    del sys.modules["sparsekd.ops.triton.ops"]  # it was importable only here


@pytest.fixture
def dense_cuda(
    on_cuda: Emulated, emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Let the backend "dense_cuda" run on CPU tensors, and the emulated "cuda" correct it."""
    entry = dataclasses.replace(backends.BACKENDS["dense_cuda"], device="cpu")
    monkeypatch.setitem(backends.BACKENDS, "dense_cuda", entry)
    # Imported anew, as where there is a GPU another test may have done it, with the real ones.
    monkeypatch.setitem(sys.modules, "sparsekd.ops.cuda.ops", emulated_module)
    monkeypatch.setattr(cuda, "ops", emulated_module, raising=False)
    monkeypatch.delitem(sys.modules, "sparsekd.ops.cuda.dense", raising=False)
    backends.load.cache_clear()
    backends.module("dense_cuda")
    yield
    del sys.modules["sparsekd.ops.cuda.dense"]
    backends.load.cache_clear()


@pytest.fixture
def on_gpu(on_cuda, dense_cuda, on_triton, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test on the backend "gpu", on CPU tensors, with our own of its backends emulated."""
    import gpu_choice  # which needs Triton

    entry = dataclasses.replace(backends.BACKENDS["gpu"], device="cpu")
    monkeypatch.setitem(backends.BACKENDS, "gpu", entry)
    backends.load.cache_clear()
    gpu_choice.choose_with(monkeypatch, lambda device: None)
    with skd.backend("gpu"):
        yield
    del sys.modules["sparsekd.ops.dispatch.gpu"]


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure products however small."""
    from sparsekd.ops.dispatch import gpu_chooser  # which needs Triton

    monkeypatch.setattr(gpu_chooser, "LEAST_PRODUCTS", 1)


@pytest.fixture
def semi_structured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Let the backend "semi_structured" run on CPU tensors; count the calls of torch's kernels."""
    entry = dataclasses.replace(backends.BACKENDS["semi_structured"], device="cpu")
    monkeypatch.setitem(backends.BACKENDS, "semi_structured", entry)
    monkeypatch.setattr(_torch, "has_semi_structured", lambda device: True)
    monkeypatch.delitem(sys.modules, "sparsekd.ops.semi_structured.ops", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        backends.load.cache_clear()
        backends.module("semi_structured")
    with semi_structured_kernels.decoded() as calls:
        yield calls
    del sys.modules["sparsekd.ops.semi_structured.ops"]
    backends.load.cache_clear()


@pytest.fixture
def on_semi_structured(semi_structured, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run the test on the backend; what it does not take runs on "reference"."""
    entry = dataclasses.replace(backends.BACKENDS["semi_structured"], extends="reference")
    monkeypatch.setitem(backends.BACKENDS, "semi_structured", entry)
    with skd.backend("semi_structured"):
        yield semi_structured


@pytest.fixture(scope="session", autouse=True)
def bounds_of_interpreted_kernels() -> Iterator[None]:
    """Let Triton's interpreter check bounds wherever it runs."""
    if "TRITON_INTERPRET" not in os.environ:
        yield
        return
    from triton_bounds import checked_bounds

    with checked_bounds():
        yield


@pytest.fixture(scope="session")
def on_ptx_library(compile_for_the_cpu: Compile, compile_to_ptx: Compile) -> OnPtx:
    return OnPtx.of_kernels()


@pytest.fixture
def on_ptx(on_cuda: Emulated, on_ptx_library: OnPtx, bind: Callable[[Emulated], None]) -> OnPtx:
    """Run the test on the backend "cuda", on CPU tensors, as what nvcc has made of the kernels."""
    bind(on_ptx_library)
    return on_ptx_library
