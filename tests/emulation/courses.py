"""Train a model by RigL on a backend and on the CPU, and hold one course against the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.nn import sparse_modules

STEPS, EVERY, UPDATES = 50, 9, 5


class Course(NamedTuple):
    """The losses of a run, and every mask after each of its updates."""

    losses: list[float]
    masks: list[dict[str, Tensor]]


def assert_same_course(backend: str, build: Callable[[], nn.Module], batch: int, size: int) -> None:
    """Train for 50 steps with five updates on a backend and on the CPU; masks must be equal.

    Args:
        backend: to hold against "cpp".
        build: returns the sparse model, the same one every time.
        batch: images a step.
        size: of the images.
    """
    ours, expected = (_train(name, build(), batch, size) for name in (backend, "cpp"))
    assert len(ours.masks) == len(expected.masks) == UPDATES
    for masks, same in zip(ours.masks, expected.masks, strict=True):
        for name, mask in masks.items():
            assert torch.equal(mask, same[name]), name
    assert not all(map(torch.equal, ours.masks[0].values(), ours.masks[-1].values()))
    assert ours.losses == pytest.approx(expected.losses, rel=1e-5)


def _train(backend: str, model: nn.Module, batch: int, size: int) -> Course:
    # Slow enough that rounding stays rounding: a faster run tells its roundings apart, as any does.
    opt = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    dst = skd.dst.RigL(model, opt, drop_fraction=0.3, every=EVERY, until=2 * STEPS)
    course = Course([], [])
    with skd.backend(backend):
        for x, y in _batches(batch, size):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            course.losses.append(loss.item())
            if dst.step():
                course.masks.append({n: m.topology.mask() for n, m in sparse_modules(model)})
            else:
                opt.step()
    return course


def _batches(batch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x = torch.randn(batch, 3, size, size, generator=generator)
        yield x, torch.randint(10, (batch,), generator=generator)
