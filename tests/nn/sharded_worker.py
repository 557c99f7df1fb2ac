"""What every rank does in tests/nn/test_sharded.py; started by torchrun."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from sparsekd import backend, dst, sparsify
from sparsekd.nn import sparse_modules

FULL = StateDictOptions(full_state_dict=True)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def network(layout: str = "csr", seed: int = 0) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(72, 5)),
    )
    return sparsify(model.double(), 0.5, seed=seed, layout=layout)


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 8, 8, dtype=torch.float64, generator=generator)


def shard(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for _, module in sparse_modules(model):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(called: nn.Module, twin: nn.Module, optimizer: str, rank: int, world: int) -> float:
    """Train both, the first on shares; return by how much their results ever differ."""
    optimizers = [OPTIMIZERS[optimizer](m.parameters()) for m in (called, twin)]
    called.eval(), twin.eval()  # statistics of a share would not be those of the batch
    worst = 0.0
    for step in range(4):
        x = batch(step)
        shares = (x[rank::world], x)
        for model, held, share in zip((called, twin), optimizers, shares, strict=True):
            held.zero_grad()
            model(share).square().mean().backward()
            held.step()
        with torch.no_grad():
            worst = max(worst, (called(x) - twin(x)).abs().max().item())
    return worst


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layout in ("csr", "bcsr:2", "fanin", "nm:2:4"):
        for name in OPTIMIZERS:
            for kernels in ("cpp", "auto"):
                model = network(layout)
                twin = copy.deepcopy(model)
                with backend(kernels):
                    key = f"{layout} {name} {kernels}"
                    found[key] = train(shard(model), twin, name, rank, world)
    return found


def fsdp1(rank: int, world: int) -> dict[str, Any]:
    found = {}
    for original in (False, True):
        model = network()
        twin = copy.deepcopy(model)
        called = FullyShardedDataParallel(
            model, use_orig_params=original, device_id=torch.device("cpu")
        )
        found[f"use_orig_params={original}"] = train(called, twin, "sgd", rank, world)
    return found


def gathered(rank: int, world: int) -> dict[str, Any]:
    """Take a full state out of a sharded model, into a plain one, and back in."""
    model = network()
    twin = copy.deepcopy(model)
    train(shard(model), twin, "sgd", rank, world)
    state = get_model_state_dict(model, options=FULL)
    plain = network(seed=1)  # of another topology
    if rank == 0:
        plain.load_state_dict(state)
    expected = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    result: dict[str, Any] = {"repr": repr(model)}
    if rank == 0:
        result["difference"] = max(
            (plain.state_dict()[name] - tensor).abs().max().item()
            for name, tensor in expected.items()
        )
        result["same topology"] = all(
            module.topology == twin.get_submodule(name).topology
            for name, module in sparse_modules(plain)
        )
    again = shard(network())
    set_model_state_dict(again, expected, options=FULL)
    with torch.no_grad():
        result["loaded"] = (again.eval()(batch(9)) - twin(batch(9))).abs().max().item()
    return result


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank: int, world: int) -> dict[str, str]:
    found = {}
    model = shard(network())
    held = torch.optim.SGD(model.parameters(), lr=0.1)
    methods = {
        "RigL": lambda m, o: dst.RigL(m, o, until=9),
        "GMP": lambda m, o: dst.GMP(m, o, sparsity=0.9, until=9),
        "ITOP": lambda m, o: dst.ITOP(m, o, until=9),
        "TopKAST": lambda m, o: dst.TopKAST(m, o, sparsity=0.9, backward_sparsity=0.7, until=9),
    }
    for name, method in methods.items():
        found[f"fsdp2 {name}"] = message(lambda method=method: method(model, held))
    mask = ~model[0].topology.mask()
    found["rewire"] = message(lambda: model[0].rewire(mask))
    found["dense_weight"] = message(lambda: model[0].dense_weight())
    for original in (False, True):
        inner = network()
        called = FullyShardedDataParallel(
            inner, use_orig_params=original, device_id=torch.device("cpu")
        )
        held = torch.optim.SGD(called.parameters(), lr=0.1)
        called(batch(0)).sum().backward()
        for whose, one in (("wrapper", called), ("module", inner)):
            key = f"fsdp1 {original} {whose}"
            found[key] = message(lambda one=one, held=held: dst.RigL(one, held, until=9))
        found[f"freed {original}"] = message(
            lambda inner=inner: inner[5](torch.ones(2, 72).double())
        )
    model = network()
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    found["zero"] = message(lambda: dst.RigL(model, zero, until=9))
    return found


def zero(rank: int, world: int) -> float:
    """Train a static topology under DistributedDataParallel and ZeRO."""
    model = network()
    twin = copy.deepcopy(model)
    called = DistributedDataParallel(model.eval())
    twin.eval()
    held = ZeroRedundancyOptimizer(called.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    other = OPTIMIZERS["sgd"](twin.parameters())
    for step in range(4):
        x = batch(step)
        held.zero_grad(), other.zero_grad()
        called(x[rank::world]).square().mean().backward()
        twin(x).square().mean().backward()
        held.step(), other.step()
    return (called(x) - twin(x)).abs().max().item()


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    scenarios = (fsdp2, fsdp1, gathered, refusals, zero)
    results = {scenario.__name__: scenario(rank, world) for scenario in scenarios}
    torch.save(results, Path(sys.argv[1]) / f"rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()
    # A thread of gloo may still hold tensors of the last collective, and dropping them without an
    # interpreter aborts the process: https://github.com/pytorch/pytorch/pull/179291
    os._exit(0)


if __name__ == "__main__":
    main()
