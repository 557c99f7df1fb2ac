"""Long strides, wide padding and dilation cost what the outputs do; values are dense torch's."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekd as skd
from sparsekd import functional
from sparsekd.ops import borders, growth

FAR = 1_000_000
MORE = 1 << 29  # bytes of address space that a backend may take, for all cases together
# Map size, kernel, stride, padding, dilation.
CASES = [
    (1, 3, 10_000, 1, 1),
    (1, 3, FAR, 1, 1),
    (7, 2, FAR, 0, 2),
    (90, 3, 30, 1, 1),  # 900 phases of the stride, nine of them with taps
    (8, 3, FAR, FAR, 1),  # three outputs a side, the middle one inside
    (8, 3, 1, FAR, FAR),  # the middle tap inside
    (5, 31, 1, 15, 1),  # a kernel larger than the map
    (6, 3, 1000, 3000, 1000),
    (1, 1, 1 << 30, 0, 1),
]


def layer(size: int, kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, which of it is stored, and an input."""
    generator = torch.Generator().manual_seed(size)
    weight, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 2, kernel, kernel), (3, 4, size, size))
    )
    return weight, torch.rand(weight.shape, generator=generator) < 0.5, x.requires_grad_()


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail to allocate more than `MORE` bytes beyond what the process has mapped."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MORE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def compare(backend: str) -> None:
    """Compare all cases with dense torch, alone in a process: memory once mapped can be reused."""
    for size, kernel, *geometry in CASES:
        weight, mask, x = layer(size, kernel)
        dense = (weight * mask).requires_grad_()
        wanted = F.conv2d(x, dense, None, *geometry, 2)
        grad = torch.randn_like(wanted)
        dx, dweight = torch.autograd.grad(wanted, (x, dense), grad)

        topology, values = skd.Topology.from_mask(mask), weight[mask].requires_grad_()
        names = dict(zip(("stride", "padding", "dilation"), geometry, strict=True))
        with little_memory(), skd.backend(backend):
            y = functional.conv2d(topology, values, x, **names, groups=2)
            found = torch.autograd.grad(y, (x, values), grad)
            every = [[n, n] for n in geometry]
            rest: list[Any] = [list(mask.shape), every[0], 2 * every[1], every[2], 2]
            gradient = torch.zeros(6, mask[0].numel(), dtype=torch.float64)
            for row, col, block in growth.gradient([(grad, x.detach(), rest)]):
                gradient[row : row + len(block), col : col + block.shape[1]] = block
        for a, b in (
            (y, wanted),
            (found[0], dx),
            (found[1], dweight[mask]),
            (gradient.view(mask.shape), dweight),
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m: f"{geometry}: {m}")  # noqa: B023


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process")
@pytest.mark.parametrize("backend", ["reference", "cpp", "dense", "auto"])
def test_geometries_that_are_mostly_outside_the_map(backend: str) -> None:
    command = [sys.executable, __file__, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("backend", ["reference", "cpp", "dense", "auto"])
def test_padding_that_is_wide_on_one_side(backend: str) -> None:
    """Of 2 x 2 outputs one is inside the map, below the padding on top and left of the other."""
    weight, mask, x = layer(8, 3)
    inside = F.conv2d(x, weight * mask, None, FAR, (0, 1), 1, 2)
    wanted = torch.zeros(3, 6, 2, 2, dtype=torch.float64)
    wanted[:, :, 1:, :1] = inside
    topology = skd.Topology.from_mask(mask)
    with skd.backend(backend):
        y = functional.conv2d(
            topology, weight[mask], x, stride=FAR, padding=(FAR, 0, 1, FAR), groups=2
        )
        grad = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-9)
    (wanted_dx,) = torch.autograd.grad(inside, x, grad[:, :, 1:, :1])
    torch.testing.assert_close(dx, wanted_dx, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "far"),
    [(224, 16, 16, 0, False), (1, 7, 1, 3, False), (32, 3, 2, 1, False), (1, 3, 10_000, 1, True)],
)
def test_usual_geometries_do_not_reach_far(
    size: int, kernel: int, stride: int, padding: int, far: bool
) -> None:
    out = (size + 2 * padding - kernel) // stride + 1
    geometry = borders.Geometry(
        (size, size), (out, out), (8, 8, kernel, kernel), (stride,) * 2, (padding,) * 4, (1, 1), 1
    )
    assert borders.reaches_far(geometry) == far


if __name__ == "__main__":
    compare(sys.argv[1])
