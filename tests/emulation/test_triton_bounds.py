"""Interpreted kernels that leave their tensors are found, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language")

INTERPRETED = "TRITON_INTERPRET" in os.environ
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
def test_the_tests_below_pass_in_the_interpreter() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout


@triton.jit
def shift_kernel(x, y, first, last, shift, HOW: tl.constexpr):
    """y[i] = x[i + shift] for first <= i < last, eight elements a program."""
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    mask = (i >= first) & (i < last)
    value = tl.load(x + i + shift, mask=mask, other=0.0)
    if HOW == "add":
        tl.atomic_add(y + i, value, mask=mask)
    else:
        tl.store(y + i, value, mask=mask)


def shift(first: int, last: int, by: int, how: str = "store", elements: int = 20) -> torch.Tensor:
    x, y = torch.arange(20.0), torch.zeros(elements)
    shift_kernel[(3,)](x, y, first, last, by, how)
    return y


@interpreted
@pytest.mark.parametrize("how", ["store", "add"])
def test_masked_elements_may_lie_anywhere(how: str) -> None:
    assert shift(0, 20, 0, how).tolist() == list(range(20))
    assert shift(0, 18, 2, how).tolist()[:18] == list(range(2, 20))


@interpreted
@pytest.mark.parametrize(
    "args, diagnosis",
    [
        ((0, 20, 1), r"program \(2, 0, 0\) loads 4 bytes at \+80 of the 80 bytes .* 1 of 4"),
        ((0, 20, -1), r"program \(0, 0, 0\) loads 4 bytes at -4 of the 80 bytes"),
        ((0, 21, -1), "loads 4 bytes at -4"),
        ((0, 24, -2), "loads"),
        ((0, 20, 0, "store", 19), r"stores 4 bytes at \+76 of the 76 bytes of a tensor \(19,\)"),
        ((0, 20, 0, "add", 19), r"updates 4 bytes at \+76"),
    ],
)
def test_others_may_not(args: tuple, diagnosis: str) -> None:
    # The interpreter wraps what kernels raise.
    with pytest.raises(triton.runtime.errors.InterpreterError, match=f"OutOfBounds.*{diagnosis}"):
        shift(*args)
