"""RigL trains a small ResNet of tiles on the backend "triton" as it does on the CPU.

Triton's interpreter runs the kernels, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.nn import sparse_modules

STEPS, EVERY, UPDATES = 50, 9, 5
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


class Course(NamedTuple):
    """Hold what a run did: its losses, and every mask after each update."""

    losses: list[float]
    masks: list[dict[str, Tensor]]


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(4, 3, 4, 4, generator=generator)
        yield x, torch.randint(10, (4,), generator=generator)


def train(backend: str) -> Course:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, padding=1)
    network = nn.Sequential(
        stem, Block(16, 32, 1), Block(32, 32, 2), nn.Flatten(), nn.Linear(128, 10)
    )
    model = skd.sparsify(network, sparsity=0.6, layout="bcsr", seed=0)
    # Slow enough that rounding stays rounding: a faster run tells its roundings apart, as any does.
    opt = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    dst = skd.dst.RigL(model, opt, drop_fraction=0.3, every=EVERY, until=2 * STEPS)
    course = Course([], [])
    with skd.backend(backend):
        for _, (x, y) in zip(range(STEPS), batches(), strict=False):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            course.losses.append(loss.item())
            if dst.step():
                course.masks.append({n: m.topology.mask() for n, m in sparse_modules(model)})
            else:
                opt.step()
    return course


@pytest.mark.thorough
@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
def test_rigl_makes_the_choices_of_the_cpu(on_triton) -> None:
    ours, expected = train("triton"), train("cpp")
    assert len(ours.masks) == len(expected.masks) == UPDATES
    for masks, same in zip(ours.masks, expected.masks, strict=True):
        for name, mask in masks.items():
            assert torch.equal(mask, same[name]), name
    assert not all(map(torch.equal, ours.masks[0].values(), ours.masks[-1].values()))
    assert ours.losses == pytest.approx(expected.losses, rel=1e-5)
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
