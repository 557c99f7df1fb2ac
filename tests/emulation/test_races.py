"""ThreadSanitizer finds races in the emulated machine, and none in the kernels.

Slow, as every barrier of a block joins the clocks of its threads: `make gpu-races`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "csrc" / "cuda" / "kernels.cu"
FLAG = "-fsanitize=thread"
RACE = 66  # the status that ThreadSanitizer ends with
LAYERS = (
    "test_any_layout_of_the_output_gradient[sliced",
    "test_batches_around_the_sizes_of_vectors[9-",
    "test_growth_takes_rectangles_as_they_come[cuda-forward",
    "test_masks_in_any_layout[backward-40x64",
)
FILES = [HERE / f"test_{name}.py" for name in ("ops", "growth", "cuda_topology")]

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        "SPARSEKD_EMULATION_SANITIZED" in os.environ, reason="runs under it already"
    ),
]


@pytest.fixture(scope="module")
def runtime(compiler: str) -> str:
    command = [compiler, "-print-file-name=libtsan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip("the compiler comes without ThreadSanitizer")
    return found


@pytest.fixture(scope="module")
def planted(compile_for_the_cpu, runtime: str) -> Path:
    return compile_for_the_cpu(HERE / "planted.cu", "-O1", FLAG)


def run(program: Path, *names: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}"}
    return subprocess.run([program, *names], capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize(
    "name",
    [
        "missing barrier",
        "missing second barrier",
        "missing warp barrier",
        "plain update",
        "plain count",
    ],
)
def test_planted_races_are_found(planted: Path, name: str) -> None:
    done = run(planted, "nothing", name)
    assert done.returncode == RACE
    assert "ThreadSanitizer: data race" in done.stderr
    assert f"{name.replace(' ', '_')}_kernel" in done.stderr
    assert "planted.cu:" in done.stderr, "the report says where"


def test_clean_code_is_clean(planted: Path) -> None:
    done = run(planted, "nothing", "nothing")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_kernels_have_no_races(compile_for_the_cpu, runtime: str) -> None:
    compile_for_the_cpu(KERNELS, "-O1", "-shared", FLAG)  # not under it itself
    env = {
        **os.environ,
        "SPARSEKD_EMULATION_SANITIZED": "thread",
        "LD_PRELOAD": runtime,
        "TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", *FILES, "-k"]
    done = subprocess.run(
        [*command, " or ".join(LAYERS)], env=env, capture_output=True, text=True, timeout=3600,
        cwd=HERE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
