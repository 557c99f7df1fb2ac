"""Measure what weights, gradients and momentum occupy, dense and sparse; needs no arguments.

Counts the bytes of every distinct storage held for parameters, gradients,
optimizer state and index buffers, and what the compiled module keeps beside them (its validated
copy of the indices and the plans of each layer).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import sparsekd as skd


def tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield everything that lives as long as training does."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


def allocated(model: torch.nn.Module) -> int:
    """Take one step of SGD with momentum and return the bytes of all storages held afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    optimizer.step()
    held = [t.untyped_storage() for t in tensors(model, optimizer)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def cached_bytes() -> int:
    """Return what the compiled module holds for the structures it knows."""
    return skd.ops.info()["cpp"]["cached_bytes"]


def main() -> None:
    """Print one line for each sparsity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--sparsity", default="0.8,0.9,0.95,0.98")
    options = parser.parse_args()
    original = getattr(skd.models, options.model)(num_classes=10)
    dense = allocated(copy.deepcopy(original))
    print(f"dense         {dense / 2**20:8.1f} MiB")
    for sparsity in map(float, options.sparsity.split(",")):
        before = cached_bytes()
        model = skd.sparsify(copy.deepcopy(original), sparsity=sparsity, distribution="uniform")
        sparse = allocated(model)
        plans = cached_bytes() - before
        del model  # its plans go with it, so that the next row starts from the same count
        print(
            f"sparse {sparsity:.2f}   {sparse / 2**20:8.1f} MiB = {sparse / dense:.3f} of dense; "
            f"plans {plans / 2**20:.1f} MiB, with them {(sparse + plans) / dense:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
