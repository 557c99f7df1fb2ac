"""What training holds in memory: nonzeros, not zeros."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

import sparsekd as skd


def held_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of every storage that lives from step to step, after a step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    optimizer.step()
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_a_sparse_resnet18_takes_a_quarter_of_dense_at_most() -> None:
    dense = skd.models.resnet18(num_classes=10, stem="cifar")
    sparse = skd.sparsify(copy.deepcopy(dense), sparsity=0.9)
    assert held_bytes(sparse) <= 0.25 * held_bytes(dense)
