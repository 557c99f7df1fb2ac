"""What nvcc makes of the CUDA kernels, without a GPU: no spills, vector loads, a whole table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekd import cuda_library

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"

pytestmark = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("c++filt")), reason="needs nvcc and c++filt"
)


def kernels(table: str) -> dict[str, str]:
    """Return what a table says of each kernel."""
    return dict(re.findall(r"^\| `(\w+_kernel[^`]*)` (\|.*\|)$", table, re.MULTILINE))


def test_every_kernel_compiles_for_every_gpu_without_spills_and_is_in_the_table() -> None:
    command = [sys.executable, SOURCES / "resources.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = kernels(done.stdout)
    assert {"gather_kernel<float, 4>", "sample_kernel<__half, 8>", "take_kernel"} <= found.keys()
    text = (ROOT / "docs" / "gpu.md").read_text()
    listed = kernels(text)
    assert listed.keys() == found.keys(), "the table is out of date"
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    (number,) = re.findall(r"\bV([\d.]+)", version.stdout)
    if f"resources.py` with nvcc {number}; " in text:  # another one may count otherwise
        assert listed == found, "the table is out of date"


@pytest.fixture
def instances(compile_to_ptx) -> Callable[[str], list[str]]:
    """Return a function: the code of the kernels whose mangled names have a pattern in them."""
    text = compile_to_ptx(SOURCES / "kernels.cu").read_text()
    flags = re.DOTALL | re.MULTILINE
    return lambda pattern: re.findall(rf"\.entry \S*{pattern}\S*\((.*?)^}}", text, flags)


def test_rows_of_a_mask_are_loaded_in_whole_vectors(instances) -> None:
    wide = instances(r"(?:count_rows|list_columns)_kernelILi16E")
    assert len(wide) == 2
    for body in wide:
        assert re.search(r"ld\.global\S*\.v4", body)
        assert not re.search(r"ld\.global\S*[us]8", body)


def test_wide_instances_load_whole_vectors(instances) -> None:
    """From shared memory: the unrolled products of 32 nonzeros, and of nothing else elements."""
    wide = instances(r"(?:gather|sample)_kernelI\S*Li[48]E")
    assert len(wide) == 6
    for body in wide:
        assert len(re.findall(r"ld\.shared\.v4", body)) >= 32
        assert not re.search(r"ld\.shared\.u16", body)
        assert len(re.findall(r"ld\.shared\.f32", body)) <= 2  # sums of the nonzeros


def test_the_library_loads_and_exports_nothing_but_its_functions() -> None:
    built = ROOT / "sparsekd" / "libsparsekd_cuda.so"
    if not built.exists():
        pytest.skip("the CUDA kernels are not built")
    names = subprocess.run(["nm", "-D", "--defined-only", built], capture_output=True, text=True)
    exported = {line.split()[-1] for line in names.stdout.splitlines()}
    assert exported == set(cuda_library.signatures(cuda_library.HEADER.read_text()))
    probe = f"import ctypes; ctypes.CDLL({str(built)!r}).sparsekd_cuda_transpose_scratch"
    subprocess.run([sys.executable, "-c", probe], check=True, env={**os.environ, "LD_PRELOAD": ""})
