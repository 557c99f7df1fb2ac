"""The CUDA kernels compiled for the CPU, and the backend "cuda" on CPU tensors by way of them."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ptx_machine import Module

import sparsekd as skd
from sparsekd import cuda_library
from sparsekd.errors import BackendError
from sparsekd.ops.dispatch import backends

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
ORDERS = ("forward", "backward", "shuffled")
FLAGS = (
    "-std=c++17", "-x", "c++", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas", "-DSPARSEKD_HOST_EMULATION", f"-I{HERE}",
)  # fmt: skip
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


def build(command: list[str], source: Path, headers: Path) -> Path:
    """Compile a source, once as long as nothing changes."""
    inputs = [source, *sorted(HERE.glob("*.h")), *sorted(headers.glob("*.*h")), Path(command[0])]
    # What the headers say counts, not where they are: copies with a mistake are in new folders.
    digest = hashlib.sha256(repr(command).replace(str(headers), "").encode())
    for path in inputs:
        digest.update(path.read_bytes())
    built = ROOT / "build" / "emulation" / f"{source.stem}-{digest.hexdigest()[:16]}"
    built.parent.mkdir(parents=True, exist_ok=True)
    with open(built.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes that need it one compiles
        if not built.exists():
            fresh = built.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, str(source), "-o", str(fresh)], check=True)
            fresh.replace(built)
    return built


@pytest.fixture(scope="session")
def compile_for_the_cpu(compiler: str) -> Compile:
    """Return a function that compiles a .cu file with g++."""

    def compile_(source: Path, *flags: str, headers: Path = SOURCES) -> Path:
        return build([compiler, *FLAGS, f"-I{headers}", *flags], source, headers)

    return compile_


@pytest.fixture(scope="session")
def compile_to_ptx() -> Compile:
    """Return a function that compiles a .cu file with nvcc, for the machine that executes PTX."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    flags = ["-std=c++17", "-O3", "-lineinfo", "-arch=compute_80", "-ptx"]

    def compile_(source: Path, headers: Path = SOURCES) -> Path:
        return build([nvcc, *flags, f"-I{headers}"], source, headers)

    return compile_


class Emulated(cuda_library.Library):
    """Call the emulated library, which has neither devices nor streams."""

    def _queue(self, function: Any, device: torch.device, args: tuple[Any, ...]) -> int:
        return self._call(function, (*args, 0))

    def set_order(self, order: str, seed: int = 1) -> None:
        """Choose in which order the threads of a block take their turns."""
        number, seed_ = ctypes.c_int64(ORDERS.index(order)), ctypes.c_int64(seed)
        self._functions.emulation_order(number, seed_)


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
    path = Path(backends.__file__).parents[1] / "cuda" / "ops.py"
    spec = importlib.util.spec_from_file_location("emulated_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_library, "load", lambda: emulated)
        spec.loader.exec_module(module)
    sys.modules[module.__name__] = module
    return module


@pytest.fixture
def bind(
    emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Emulated], None]:
    """Return a function that lets the backend "cuda" and topologies call a library."""

    def bind_(library: Emulated) -> None:
        monkeypatch.setattr(emulated_module, "_library", library)
        monkeypatch.setattr(cuda_library, "library_for", lambda device: library)

    return bind_


@pytest.fixture
def on_cuda(
    emulated: Emulated,
    emulated_module: ModuleType,
    bind: Callable[[Emulated], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Emulated]:
    """Run the test on the backend "cuda", topologies too, on CPU tensors."""
    entry = dataclasses.replace(
        backends.BACKENDS["cuda"], module=emulated_module.__name__, device="cpu"
    )
    monkeypatch.setitem(backends.BACKENDS, "cuda", entry)
    backends.load.cache_clear()
    bind(emulated)
    emulated.set_order("forward")
    with skd.backend("cuda"):
        yield emulated
    monkeypatch.undo()
    backends.load.cache_clear()


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

    entry = dataclasses.replace(backends.BACKENDS["triton"], device="cpu")
    monkeypatch.setitem(backends.BACKENDS, "triton", entry)
    backends.load.cache_clear()
    launches: Counter[str] = Counter()
    for name in LAUNCHES:
        launch = getattr(triton_launch, name)
        monkeypatch.setattr(triton_launch, name, counting(launches, name, launch))
    with skd.backend("triton"), float32_products("ieee"):
        yield launches
    monkeypatch.undo()
    del sys.modules["sparsekd.ops.triton.ops"]  # it was importable only here
    backends.load.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def bounds_of_interpreted_kernels() -> Iterator[None]:
    """Let Triton's interpreter check bounds wherever it runs."""
    if "TRITON_INTERPRET" not in os.environ:
        yield
        return
    from triton_bounds import checked_bounds

    with checked_bounds():
        yield


class OnPtx(Emulated):
    """Call the emulated library, whose kernels run as what nvcc has made of them.

    Args:
        path: of the emulated library.
        ptx: of the same kernels.
    """

    def __init__(self, path: Path, ptx: Path) -> None:
        super().__init__(path)
        self.module = Module(ptx.read_text())
        self.kernels: set[str] = set()  # that have run
        self._memory: list[tuple[int, int]] = []
        self._fault: Exception | None = None
        parameters = [ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.c_void_p, ctypes.c_size_t]
        self._executor = ctypes.CFUNCTYPE(ctypes.c_int, *parameters)(self._execute)

    def run(self, name: str, device: torch.device, *args: Any) -> None:
        storages = [a.untyped_storage() for a in args if isinstance(a, torch.Tensor)]
        self._memory = [(storage.data_ptr(), storage.nbytes()) for storage in storages]
        self._functions.emulation_executor(self._executor)
        try:
            super().run(name, device, *args)
        except BackendError:
            raise self._fault or AssertionError("the library refuses") from None
        finally:
            self._functions.emulation_executor(None)
            self._fault = None

    def _execute(
        self, name: bytes, blocks: int, x: int, y: int, z: int, data: int, size: int
    ) -> int:
        try:
            kernel = self.module[name.decode()]
            arguments = ctypes.string_at(data, size)
            kernel.launch((blocks,), (x, y, z), arguments, self._memory)
        except Exception as fault:  # must not pass through C
            self._fault = fault
            return 719
        self.kernels.add(name.decode())
        return 0


@pytest.fixture(scope="session")
def on_ptx_library(compile_for_the_cpu: Compile, compile_to_ptx: Compile) -> OnPtx:
    source = SOURCES / "kernels.cu"
    return OnPtx(compile_for_the_cpu(source, "-O1", "-shared"), compile_to_ptx(source))


@pytest.fixture
def on_ptx(on_cuda: Emulated, on_ptx_library: OnPtx, bind: Callable[[Emulated], None]) -> OnPtx:
    """Run the test on the backend "cuda", on CPU tensors, as what nvcc has made of the kernels."""
    bind(on_ptx_library)
    return on_ptx_library
