"""RigL trains a small ResNet of tiles on the backend "triton" as it does on the CPU.

Triton's interpreter runs the kernels, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from courses import STEPS, assert_same_course
from torch import Tensor, nn

import sparsekd as skd

INTERPRETED = "TRITON_INTERPRET" in os.environ


class Block(nn.Module):
    """Add two convolutions to their input, which a third one fits to a stride."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.skip(x)).relu()


def network() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, padding=1)
    blocks = Block(16, 32, 1), Block(32, 32, 2)
    model = nn.Sequential(stem, *blocks, nn.Flatten(), nn.Linear(128, 10))
    return skd.sparsify(model, sparsity=0.6, layout="bcsr", seed=0)


@pytest.mark.thorough
@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
def test_rigl_makes_the_choices_of_the_cpu(on_triton) -> None:
    assert_same_course("triton", network, batch=4, size=4)
    assert on_triton["tile_product"] > STEPS


@pytest.mark.thorough
@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
def test_training_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "thorough", __file__]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
