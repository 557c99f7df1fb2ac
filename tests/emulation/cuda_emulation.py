"""The CUDA kernels on the CPU: compiled by g++, or executed as the PTX that nvcc makes of them."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import hashlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from ptx_machine import Counts, Module
from torch.utils._pytree import tree_leaves

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
_numbers = itertools.count()
TO_PTX = ("-std=c++17", "-O3", "-lineinfo", "-arch=compute_80", "-ptx")


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


def find(program: str) -> str:
    """Return where a compiler is.

    Raises:
        FileNotFoundError: it is not on PATH.
    """
    found = shutil.which(program)
    if found is None:
        raise FileNotFoundError(f"needs {program}")
    return found


def compile_for_the_cpu(source: Path, *flags: str, headers: Path = SOURCES) -> Path:
    """Compile a .cu file with g++."""
    compiler = find(os.environ.get("CXX", "g++"))
    return build([compiler, *FLAGS, f"-I{headers}", *flags], source, headers)


def compile_to_ptx(source: Path, headers: Path = SOURCES) -> Path:
    """Compile a .cu file with nvcc, for the machine that executes PTX."""
    return build([find("nvcc"), *TO_PTX, f"-I{headers}"], source, headers)


class Emulated(cuda_library.Library):
    """Call the emulated library, which has neither devices nor streams."""

    def _queue(self, function: Any, device: torch.device, args: tuple[Any, ...]) -> int:
        return self._call(function, (*args, 0))

    def repeats(self) -> int:
        """Return how often sums were not finite and made a second time, since the last call."""
        return int(self._functions.emulation_repeats())

    def set_order(self, order: str, seed: int = 1) -> None:
        """Choose in which order the threads of a block take their turns."""
        number, seed_ = ctypes.c_int64(ORDERS.index(order)), ctypes.c_int64(seed)
        self._functions.emulation_order(number, seed_)


class Launch(NamedTuple):
    """A kernel that was launched, and what it did."""

    kernel: str
    grid: tuple[int, ...]
    warps: int  # of a block
    counts: Counts


class OnPtx(Emulated):
    """Call the emulated library, whose kernels run as what nvcc has made of them.

    Args:
        path: of the emulated library.
        ptx: of the same kernels.

    Attributes:
        launches: what was launched, in order.
    """

    def __init__(self, path: Path, ptx: Path) -> None:
        super().__init__(path)
        self.module = Module(ptx.read_text())
        self.launches: list[Launch] = []
        self._memory: list[tuple[int, int]] = []
        self._fault: Exception | None = None
        parameters = [ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.c_void_p, ctypes.c_size_t]
        self._executor = ctypes.CFUNCTYPE(ctypes.c_int, *parameters)(self._execute)

    @classmethod
    def of_kernels(cls) -> OnPtx:
        """Compile the kernels of csrc/cuda both ways."""
        source = SOURCES / "kernels.cu"
        return cls(compile_for_the_cpu(source, "-O1", "-shared"), compile_to_ptx(source))

    @property
    def kernels(self) -> set[str]:
        """The names of what was launched."""
        return {launch.kernel for launch in self.launches}

    def run(self, name: str, device: torch.device, *args: Any) -> None:
        found = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in found]
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
            counts = kernel.launch((blocks,), (x, y, z), arguments, self._memory)
        except Exception as fault:  # must not pass through C
            self._fault = fault
            return 719
        self.launches.append(Launch(name.decode(), (blocks,), x * y * z // 32, counts))
        return 0


def module_of(library: Emulated) -> ModuleType:
    """Return a copy of sparsekd.ops.cuda.ops of its own, bound to a library."""
    path = Path(backends.__file__).parents[1] / "cuda" / "ops.py"
    spec = importlib.util.spec_from_file_location(f"emulated_cuda_{next(_numbers)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(cuda_library, "load", return_value=library):
        spec.loader.exec_module(module)
    sys.modules[module.__name__] = module
    return module


@contextmanager
def bound(module: ModuleType, library: Emulated) -> Iterator[None]:
    """Let the backend "cuda" and topologies call a library."""
    with (
        mock.patch.object(module, "_library", library),
        mock.patch.object(cuda_library, "library_for", return_value=library),
    ):
        yield


@contextmanager
def on_the_cpu(name: str, **changes: Any) -> Iterator[None]:
    """Run a GPU backend, topologies too, on CPU tensors.

    Args:
        name: "cuda" or "triton".
        changes: of the backend's entry in the table.
    """
    entry = dataclasses.replace(backends.BACKENDS[name], device="cpu", **changes)
    try:
        with mock.patch.dict(backends.BACKENDS, {name: entry}):
            backends.load.cache_clear()
            with skd.backend(name):
                yield
    finally:
        backends.load.cache_clear()
