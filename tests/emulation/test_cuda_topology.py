"""Structures that the CUDA kernels make, on the emulated machine, are those that torch makes."""

from __future__ import annotations

import pytest
import torch
from structures import assert_topology_says_what_the_mask_does, random_mask
from torch import Tensor

from sparsekd import Topology, csr, cuda_library
from sparsekd.errors import BackendError
from sparsekd.testing import poisoned_memory


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


ORDERS = ("forward", "backward", "shuffled")
# Around the sizes of vectors, warps, blocks and words of marks; rows of whole vectors among them.
SHAPES = [
    (1, 1), (9, 15), (8, 16), (31, 17), (32, 48), (33, 33), (65, 529), (5, 1040), (2, 1), (1, 700),
    (700, 1), (0, 5), (5, 0), (0, 0), (0, 32), (70, 300),
]  # fmt: skip


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, on_cuda) -> str:
    on_cuda.set_order(request.param)
    return request.param


@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_indices_are_those_of_the_mask(order: str, shape: tuple[int, int], density: float) -> None:
    with poisoned_memory():
        assert_topology_says_what_the_mask_does(random_mask(*shape, density, seed=sum(shape)))


@pytest.mark.parametrize("shape", [(40, 64), (64, 40, 3, 3), (12, 5, 2)], ids=name_of)
def test_masks_in_any_layout(order: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    numel = torch.Size(shape).numel()
    drawn = torch.rand(2 * numel + 1, generator=generator) < 0.3
    layouts = {
        "from an odd address": drawn[1 : numel + 1].view(shape),
        "every other one": drawn[: 2 * numel : 2].view(shape),
        "transposed": drawn[:numel].view(shape[::-1]).permute(*range(len(shape))[::-1]),
        "expanded": drawn[: shape[0]].view(-1, *[1] * (len(shape) - 1)).expand(shape),
    }
    for mask in layouts.values():
        with poisoned_memory():
            assert_topology_says_what_the_mask_does(mask)


def rewired(old: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    new, delta = Topology.from_mask(old).rewire(mask)
    assert new.version == 1
    return new.crow_indices, new.col_indices, delta.source, *new.transpose()


def test_topologies_go_through_the_library(on_cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = random_mask(37, 80, 0.2, seed=1), random_mask(37, 80, 0.3, seed=2)
    calls: list[str] = []
    run = on_cuda.run
    monkeypatch.setattr(on_cuda, "run", lambda name, *a: calls.append(name) or run(name, *a))
    found = rewired(old, new)
    assert calls == ["mask_crow", "mask_col"] * 2 + ["transpose"]
    monkeypatch.setattr(cuda_library, "library_for", lambda device: None)
    for ours, expected in zip(found, rewired(old, new), strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)
    assert len(calls) == 5, "without the library, torch makes them"


@pytest.mark.parametrize("rows, cols", [(-1, 4), (4, -1), (1 << 16, 1 << 16), (1, 1 << 31)])
def test_sizes_that_do_not_fit_are_refused(on_cuda, rows: int, cols: int) -> None:
    cpu, no_tensors = torch.device("cpu"), [None] * 6
    for name, count in (("mask_crow", 2), ("mask_col", 3), ("transpose", 6)):
        with pytest.raises(BackendError, match=f"{name}: CUDA error 1, invalid argument"):
            on_cuda.run(name, cpu, rows, cols, *no_tensors[:count])


def test_masks_larger_than_the_kernels_take(on_cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    run = on_cuda.run
    monkeypatch.setattr(csr, "MOST_POSITIONS", 300)
    monkeypatch.setattr(on_cuda, "run", lambda *args: sizes.append(args[2:4]) or run(*args))
    assert_topology_says_what_the_mask_does(random_mask(33, 40, 0.3))
    assert sizes
    assert all(rows * cols <= 300 for rows, cols in sizes)
