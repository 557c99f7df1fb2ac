"""Triton's interpreter runs the kernels on layers of every kind, in a process of its own.

It is chosen by a variable that is read when Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="runs in the interpreter already")
def test_interpreted_kernels_pass() -> None:
    triton = pytest.importorskip("triton", reason="needs Triton")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton 3.6 needs NumPy before 2.4")
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    names = "triton_ops", "triton_infinity", "triton_packing", "growth"
    files = [HERE / f"test_{name}.py" for name in names]
    # Of the tests of growth those of the backend "triton".
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", "not cuda"]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=1800, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
