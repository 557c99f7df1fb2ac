"""The C library of frozen networks, built from the tree that built the compiled module."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


class Described(ctypes.Structure):
    """`sparsekd_tensor` of csrc/include/sparsekd.h."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("axes", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("length", ctypes.c_int64),
    )


class CLibrary:
    """The functions of csrc/include/sparsekd.h; what fails raises ValueError with its message."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self.calls.sparsekd_error.restype = ctypes.c_char_p
        self.calls.sparsekd_load.argtypes, self.calls.sparsekd_load.restype = [pointer], pointer
        self.calls.sparsekd_load_bytes.argtypes = [pointer, ctypes.c_size_t]
        self.calls.sparsekd_load_bytes.restype = pointer
        self.calls.sparsekd_free.argtypes = [pointer]
        self.calls.sparsekd_inputs.argtypes = self.calls.sparsekd_outputs.argtypes = [pointer]
        for describe in (self.calls.sparsekd_input, self.calls.sparsekd_output):
            describe.argtypes = [pointer, number, pointer]
        self.calls.sparsekd_run.argtypes = [pointer, pointer, pointer, ctypes.c_int64, number]

    def error(self) -> str:
        return str(self.calls.sparsekd_error().decode(errors="replace"))

    def load(self, source: Path | bytes) -> int:
        """Load a file or bytes; `free` what comes back."""
        if isinstance(source, bytes):
            network = self.calls.sparsekd_load_bytes(source, len(source))
        else:
            network = self.calls.sparsekd_load(os.fsencode(source))
        if not network:
            raise ValueError(self.error())
        return int(network)

    def free(self, network: int) -> None:
        self.calls.sparsekd_free(network)

    def shapes(self, network: int, what: str) -> list[tuple[int, ...]]:
        """Return the shapes of all "input"s or "output"s."""
        found = []
        for index in range(getattr(self.calls, f"sparsekd_{what}s")(network)):
            about = Described()
            describe = getattr(self.calls, f"sparsekd_{what}")
            assert describe(network, index, ctypes.byref(about)) == 0
            found.append(tuple(about.shape[: about.axes]))
            assert about.dtype == 0
            assert about.length == int(np.prod(found[-1], dtype=np.int64))
        return found

    def run(self, network: int, *inputs: Tensor, threads: int = 1) -> list[Tensor]:
        batch = len(inputs[0])
        results = [
            torch.full((batch, *shape), float("nan")) for shape in self.shapes(network, "output")
        ]
        taken = (ctypes.c_void_p * len(inputs))(*(x.contiguous().data_ptr() for x in inputs))
        given = (ctypes.c_void_p * len(results))(*(x.data_ptr() for x in results))
        if self.calls.sparsekd_run(network, taken, given, batch, threads):
            raise ValueError(self.error())
        return results


@pytest.fixture(scope="session")
def c_library() -> CLibrary:
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    if not (build / "CMakeCache.txt").exists():
        pytest.skip(f"the compiled module was not built here: no CMake cache in {build}")
    if not shutil.which("cmake"):
        pytest.skip("no cmake on PATH")
    built = subprocess.run(
        ["cmake", "--build", str(build), "--target", "sparsekd"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return CLibrary(next((build / "lib").glob("libsparsekd.*")))
