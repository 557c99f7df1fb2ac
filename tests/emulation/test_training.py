"""RigL trains a small ResNet on the backend "cuda" as it does on the CPU, its kernels emulated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.nn import sparse_modules

STEPS, EVERY, UPDATES = 50, 9, 5


class Course(NamedTuple):
    """Hold what a run did: its losses, and every mask after each update."""

    losses: list[float]
    masks: list[dict[str, Tensor]]


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(6, 3, 8, 8, generator=generator)
        yield x, torch.randint(10, (6,), generator=generator)


def train(backend: str) -> Course:
    torch.manual_seed(0)
    model = skd.sparsify(skd.models.resnet20(width=0.25), sparsity=0.7, seed=0)
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


def test_rigl_makes_the_choices_of_the_cpu(on_cuda) -> None:
    ours, expected = train("cuda"), train("cpp")
    assert len(ours.masks) == len(expected.masks) == UPDATES
    for masks, same in zip(ours.masks, expected.masks, strict=True):
        for name, mask in masks.items():
            assert torch.equal(mask, same[name]), name
    assert ours.losses == pytest.approx(expected.losses, rel=1e-5)
