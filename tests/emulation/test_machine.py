"""The emulated machine finds every kind of mistake it says it finds, and none in clean code."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).with_name("planted.cu")
ORDERS = ("forward", "backward", "shuffled")
THREADS = 64

Run = Callable[..., tuple[int, str, list[float]]]


@pytest.fixture(scope="module")
def planted(compile_for_the_cpu) -> Run:
    """Return a function that runs a planted kernel: its code, the diagnosis and what it wrote."""
    library = ctypes.CDLL(str(compile_for_the_cpu(SOURCE, "-O1", "-shared")))
    library.planted_error.restype = ctypes.c_char_p

    def run(name: str, order: str = "forward") -> tuple[int, str, list[float]]:
        library.emulation_order(ctypes.c_int64(ORDERS.index(order)), ctypes.c_int64(3))
        out = (ctypes.c_float * THREADS)()
        code = library.planted(name.encode(), out)
        assert code != -1, f"nothing planted under {name!r}"
        return code, library.planted_error().decode(), list(out)

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_clean_code_runs_in_every_order(planted: Run, order: str) -> None:
    assert planted("nothing", order) == (0, "", [math.comb(THREADS, 2)] * THREADS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name, diagnosis",
    [
        ("divergent barrier", "threads of a block wait at different barriers"),
        ("caller not in mask", "the mask does not name the calling lane"),
        ("lane leaves before shuffle", "the mask names lane 5, which has left"),
        ("absent lanes", "the mask names lane 8, which has left"),
        ("different collectives", "lanes meet in different collectives"),
        ("different masks", "with different masks"),
        ("shuffle from outside", "a shuffle reads lane 20, which takes no part"),
        ("deadlock", "deadlock: a lane waits in a collective"),
        ("too much shared memory", "too much shared memory: 65536 bytes"),
        ("too many threads", "invalid configuration: 1 blocks of 1025 threads"),
    ],
)
def test_undefined_behaviour_is_named(planted: Run, name: str, diagnosis: str, order: str) -> None:
    code, error, _ = planted(name, order)
    assert code != 0
    assert diagnosis in error
    if "threads" not in name and "shared" not in name:
        assert "planted.cu:" in error, "the diagnosis says where"
    assert planted("nothing")[0] == 0, "the machine works on after a fault"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("missing barrier", [float(THREADS - 1 - i) for i in range(THREADS)]),
        ("missing second barrier", [1.0] * THREADS),
    ],
)
def test_a_missing_barrier_changes_results(planted: Run, name: str, expected: list[float]) -> None:
    assert any(planted(name, order)[2] != expected for order in ORDERS)


def test_shared_memory_starts_as_nan(planted: Run) -> None:
    code, _, out = planted("unwritten shared memory")
    assert code == 0
    assert all(map(math.isnan, out))


@pytest.fixture(scope="module")
def sanitized(compile_for_the_cpu, sanitizers) -> Path:
    return compile_for_the_cpu(SOURCE, "-O1", *sanitizers)


@pytest.mark.parametrize(
    "name, finding",
    [
        ("read past the end", "heap-buffer-overflow"),
        ("shared memory past the end", "index 64 out of bounds"),
        ("misaligned vector", "misaligned address"),
    ],
)
def test_sanitizers_see_into_the_machine(sanitized: Path, name: str, finding: str) -> None:
    done = subprocess.run([sanitized, name], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert finding in done.stderr
    assert "planted.cu:" in done.stderr, "the report says where"


def test_sanitizers_find_nothing_in_clean_code(sanitized: Path) -> None:
    faults = ["nothing", "deadlock", "nothing"]  # a fault leaves threads behind that never end
    done = subprocess.run([sanitized, *faults], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("deadlock: deadlock:")
    assert done.stdout.endswith("\n2016\n")


def test_memory_is_set_where_it_is_asked_for(compile_for_the_cpu) -> None:
    library = ctypes.CDLL(str(compile_for_the_cpu(SOURCE, "-O1", "-shared")))
    out = (ctypes.c_float * THREADS)(*[7.0] * THREADS)
    assert library.clear_inside(out) == 0
    assert list(out) == [7.0, *[0.0] * (THREADS - 2), 7.0]


HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("name", HALVES)
def test_halves_convert_as_torch_does(compile_for_the_cpu, tmp_path: Path, name: str) -> None:
    source = tmp_path / "convert.cu"
    source.write_text(
        """
#include "half.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void float16(int n, const float* in, uint16_t* half, float* out) {
  for (int i = 0; i < n; ++i) {
    half[i] = __float2half_rn(in[i]).bits;
    out[i] = __half2float({half[i]});
  }
}
EXPORT void bfloat16(int n, const float* in, uint16_t* half, float* out) {
  for (int i = 0; i < n; ++i) {
    half[i] = __float2bfloat16_rn(in[i]).bits;
    out[i] = __bfloat162float({half[i]});
  }
}
"""
    )
    library = ctypes.CDLL(str(compile_for_the_cpu(source, "-O1", "-shared")))
    exact = torch.arange(1 << 16).to(torch.int16).view(HALVES[name]).float()
    exact = exact[exact.isfinite()]
    between = (exact[1:] + exact[:-1]) / 2  # ties
    above = torch.nextafter(between, torch.tensor(math.inf))
    special = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 1e-40, -0.0])
    x = torch.cat([exact, between, above, special])
    half, back = torch.empty(len(x), dtype=torch.int16), torch.empty(len(x))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, half, back))
    getattr(library, name)(len(x), *pointers)
    expected = x.to(HALVES[name])
    assert torch.equal(back.isnan(), expected.isnan())
    assert torch.equal(back.nan_to_num(7.0), expected.float().nan_to_num(7.0))
    assert torch.equal(half[~x.isnan()], expected.view(torch.int16)[~x.isnan()])
