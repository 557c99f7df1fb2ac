"""The kernels stay in their buffers and do nothing undefined, on every kind of layer and mask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "csrc" / "cuda" / "kernels.cu"
TESTS = (
    "test_random_layers_equal_masked_dense[60-",
    "test_batches_around_the_sizes_of_vectors[9-",
    "test_growth_takes_rectangles_as_they_come[cuda",
    "test_sums_in_parts",
    "test_indices_are_those_of_the_mask[shuffled",
    "test_masks_in_any_layout[backward",
)
FILES = [HERE / f"test_{name}.py" for name in ("ops", "growth", "cuda_topology")]


def runtime(compiler: str, name: str) -> str:
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif("SPARSEKD_EMULATION_SANITIZED" in os.environ, reason="runs under them already")
def test_the_sanitizers_have_nothing_to_report(compiler, compile_for_the_cpu, sanitizers) -> None:
    preload = (runtime(compiler, name) for name in ("libasan.so", "libstdc++.so"))
    compile_for_the_cpu(KERNELS, "-O1", "-shared", *sanitizers)  # not under them itself
    env = {
        **os.environ,
        "SPARSEKD_EMULATION_SANITIZED": "1",
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    chosen = " or ".join(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-x", *FILES, "-k", chosen]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
