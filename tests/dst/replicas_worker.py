"""What every rank does in tests/dst/test_replicas.py; started by torchrun, one file a rank."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from sparsekd import dst, sparsify
from sparsekd.dst import replicas
from sparsekd.errors import TopologyError, UnsupportedError
from sparsekd.nn import SparseLinear, densify, sparse_modules

BATCH = 8
Loop = Iterator[tuple[nn.Module, dst.Updater]]


def network(sparsity: float = 0.7, seed: int = 0, layout: str = "csr") -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)),
    )
    return sparsify(model.double(), sparsity, seed=seed, layout=layout)


def batch(step: int, rank: int, world: int) -> Tensor:
    """Return this rank's part of the batch that all ranks share."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x[rank::world]


METHODS: dict[str, Callable[..., dst.Updater]] = {
    "set": lambda m, o: dst.SET(m, o, drop_fraction=0.5, every=2, until=10**6),
    "rigl": lambda m, o: dst.RigL(m, o, drop_fraction=0.5, every=2, until=10**6),
    "rigl-bcsr": lambda m, o: dst.RigL(m, o, drop_fraction=0.5, every=2, until=10**6),
    "set-fanin": lambda m, o: dst.SET(m, o, drop_fraction=0.5, every=2, until=10**6),
    "itop": lambda m, o: dst.ITOP(m, o, drop_fraction=0.5, every=2, until=10**6),
    "mest": lambda m, o: dst.MEST(m, o, sparsity=0.7, extra=0.1, every=2, until=10**6),
    "srigl": lambda m, o: dst.SRigL(m, o, drop_fraction=0.5, every=2, until=10**6),
    "rigl-sm": lambda m, o: dst.RigLSM(m, o, drop_fraction=0.5, every=2, until=10**6),
    "rigl-sg": lambda m, o: dst.RigLSG(m, o, drop_fraction=0.5, every=2, until=10**6),
    "snfs": lambda m, o: dst.SNFS(m, o, drop_fraction=0.5, every=2, until=10**6),
    "gmp": lambda m, o: dst.GMP(m, o, sparsity=0.95, every=2, until=20),
    "granet": lambda m, o: dst.GraNet(m, o, sparsity=0.95, every=2, until=22),
    "acdc": lambda m, o: dst.ACDC(
        m, o, sparsity=0.95, compress=range(2, 40, 4), decompress=range(4, 40, 4)
    ),
    "topkast": lambda m, o: dst.TopKAST(
        m, o, sparsity=0.9, backward_sparsity=0.7, every=2, until=10**6
    ),
}
# What four processes run every day: growth at random, growth by gradients in tiles, another number
# of nonzeros at each update, and rows that store equally many.
FOUR = ("set", "rigl-bcsr", "gmp", "srigl")
LAYOUTS = {"rigl-bcsr": "bcsr:2", "set-fanin": "fanin:2"}
DENSE_AT_FIRST = ("gmp", "granet", "acdc", "topkast")


def rewires(method: str, world: int) -> int:
    """Return how often a method rewires: two of them go far, where that is cheapest."""
    return 100 if method in ("set", "rigl") and world == 2 else 10


def train(method: str, steps: int, rank: int, world: int, passes: int = 1) -> dict[str, Any]:
    """Train `steps` steps, on one rank without any DistributedDataParallel."""
    model = network(0.0 if method in DENSE_AT_FIRST else 0.7, layout=LAYOUTS.get(method, "csr"))
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    updater = METHODS[method](wrapped, optimizer)
    identities = [id(p) for p in model.parameters()]
    known = set(identities)
    rewired = 0
    for step in range(steps):
        optimizer.zero_grad()
        parts = batch(step, rank, world).chunk(passes)
        for number, x in enumerate(parts):
            last = number == len(parts) - 1
            sync = wrapped.no_sync() if world > 1 and not last else torch.enable_grad()
            with sync:
                (wrapped(x).square().mean() / len(parts)).backward()
        before = versions(model)
        if not updater.step():
            optimizer.step()
        rewired += versions(model) != before
    return {
        "masks": {name: module.topology.mask() for name, module in sparse_modules(model)},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "rewired": rewired,
        "same parameters": identities == [id(p) for p in model.parameters()],
        "held": [i for g in optimizer.param_groups for p in g["params"] if (i := id(p)) in known]
        == identities,
    }


def versions(model: nn.Module) -> list[int]:
    return [module.topology.version for _, module in sparse_modules(model)]


def many_rewires(rank: int, world: int) -> dict[str, Any]:
    return {name: train(name, 2 * rewires(name, world), rank, world) for name in chosen()}


def like_one_process(rank: int, world: int) -> dict[str, Any]:
    """Train a few steps, in which rounding cannot yet decide between two weights."""
    return {name: train(name, 12, rank, world, passes=2) for name in chosen()}


def chosen() -> list[str]:
    """Return the methods that the command line names."""
    return sys.argv[2].split(",")


def dense_gradient(rank: int, world: int) -> dict[str, Tensor]:
    """Collect the mean dense gradient over two accumulated passes on every rank."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = dst.RigL(wrapped, optimizer, every=1, until=9)
    with wrapped.no_sync():
        wrapped(batch(0, rank, world)).square().mean().backward()
    wrapped(batch(1, rank, world)).square().mean().backward()
    found = {name: updater.gradient(name) for name in updater.modules}
    twin = densify(copy.deepcopy(model))
    for step in (0, 1):
        twin(batch(step, 0, 1)).square().mean().backward()
    expected = {name: twin.get_submodule(name).weight.grad.flatten(1) for name in found}
    return {name: (found[name] - expected[name]).abs().max() for name in found}


def followed_gradient(rank: int, world: int) -> dict[str, tuple[float, list[str]]]:
    """Compare the dense gradient after loops that do more than one backward; what was reported."""
    result = {}
    loops = ("zeroed in place", "synchronised twice", "clipped", "hooked", "noisy")
    for how in loops:
        model = network()
        twin = densify(copy.deepcopy(model))
        called = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        updater = dst.RigL(called, optimizer, every=1, until=9)
        if how == "hooked":
            for _, module in sparse_modules(model):
                module.values.register_hook(lambda grad: 3 * grad)
        factor = {"clipped": 0.25, "hooked": 3.0}.get(how, 1.0)
        for step in (0, 1):
            if how == "zeroed in place":
                optimizer.zero_grad(set_to_none=False)
                twin.zero_grad()
            called(batch(step, rank, world)).square().mean().backward()
            (factor * twin(batch(step, 0, 1)).square().mean()).backward()
        for parameter in model.parameters():
            if how == "clipped":
                parameter.grad *= factor
            if how == "noisy":
                parameter.grad += 0.01 * torch.arange(len(parameter.flatten())).view_as(parameter)
        updater._gradients.settle()
        differences = [0.0]
        for name in updater.modules:
            expected = twin.get_submodule(name).weight.grad.flatten(1)
            differences.append((updater.gradient(name) - expected).abs().max().item())
        result[how] = max(differences), list(updater._gradients.foreign)
    return result


def mismatch_after_growth(rank: int, world: int) -> str:
    """Grow from a seed that is the rank, which is what must never happen silently."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = dst.SET(model, optimizer, every=1, until=9, seed=int(rank == 1))
    wrapped(batch(0, rank, world)).square().mean().backward()
    try:
        updater.step()
    except TopologyError as error:
        return str(error)
    return ""


def mismatch_at_the_start(rank: int, world: int) -> str:
    model = network(seed=int(rank == world - 1))
    updater = dst.Static(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        updater.step()
    except TopologyError as error:
        return str(error)
    return ""


def skipped_layer(rank: int, world: int) -> str:
    """Leave a layer out on rank 0 alone, as a model with branches might."""
    model = nn.ModuleDict({n: SparseLinear(6, 4, sparsity=0.5, seed=0) for n in ("used", "spare")})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = dst.RigL(model, optimizer, every=1, until=9)
    for name in ("used", "spare")[: 1 + min(rank, 1)]:
        model[name](torch.ones(2, 6)).sum().backward()
    try:
        updater.step()
    except TopologyError as error:
        return str(error)
    return ""


def bytes_on_the_wire(rank: int, world: int) -> dict[str, Any]:
    """Count what the buckets of one backward pass hold, before and after the size changes."""
    model = network(0.0)
    wrapped = DistributedDataParallel(model)
    sent = [0]

    def count(group, bucket):  # register_comm_hook cannot read annotations that are strings
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = dst.GMP(wrapped, optimizer, sparsity=0.9, every=2, until=2)
    result = []
    for step in range(4):
        sent[0] = 0
        optimizer.zero_grad()
        wrapped(batch(step, rank, world)).square().mean().backward()
        stored = sum(parameter.numel() for parameter in model.parameters())
        result.append((sent[0], 8 * stored))
        if not updater.step():
            optimizer.step()
    return {"sent": result, "buffers": sorted(wrapped.named_module_buffers)}


def gmp(model: nn.Module, optimizer: torch.optim.Optimizer) -> dst.GMP:
    return dst.GMP(model, optimizer, sparsity=0.7, every=2, until=4)


def prune(model: nn.Module, called: nn.Module, updater: dst.Updater, rank: int, world: int) -> Any:
    for step in range(6):
        updater.optimizer.zero_grad()
        called(batch(step, rank, world)).square().mean().backward()
        if not updater.step():
            updater.optimizer.step()
    return model.state_dict()


def handed_over(rank: int, world: int) -> dict[str, Any]:
    """Prune under wrappers that come to the updater in every way, and of every kind."""
    states = {}
    for how in ("alone", "as the model", "attached", "static graph", "views", "outer", "inner"):
        model = network(0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if how == "alone":
            updater = gmp(model, optimizer)
            updater.attach()
            states[how] = prune(model, model, updater, 0, 1)
            continue
        if how == "attached":
            updater = gmp(model, optimizer)
            called = DistributedDataParallel(model)
            updater.attach(called)
        elif how == "outer":
            called = DistributedDataParallel(nn.Sequential(model, nn.Tanh(), nn.Identity()))
            updater = gmp(model, optimizer)
            updater.attach(called)
            called.module[1] = nn.Identity()
        elif how == "inner":  # one wrapper for each half of the model
            halves = nn.Sequential(model[:3], model[3:])
            called = nn.Sequential(*map(DistributedDataParallel, halves))
            updater = gmp(called, optimizer)
        else:
            options = {"static_graph": how == "static graph"}
            options |= {"gradient_as_bucket_view": how == "views"}
            called = DistributedDataParallel(model, **options)
            updater = gmp(called, optimizer)
        states[how] = prune(model, called, updater, rank, world)
    return states


def no_wrapper_known(rank: int, world: int) -> dict[str, Any]:
    """Prune under a wrapper that nobody named; then say that there is none."""
    model = network(0.0)
    wrapped = DistributedDataParallel(model)
    updater = gmp(model, torch.optim.SGD(model.parameters(), lr=0.05))
    found = {"message": ""}
    try:
        prune(model, wrapped, updater, rank, world)
    except UnsupportedError as error:
        found["message"] = str(error)
    found["unchanged"] = versions(model) == [0, 0, 0]
    model = network(0.0)
    updater = gmp(model, torch.optim.SGD(model.parameters(), lr=0.05))
    updater.attach()
    prune(model, model, updater, 0, 1)  # whole batches everywhere: no gradients to exchange
    found["density"] = sum(m.topology.nnz for _, m in sparse_modules(model)) / updater.numel()
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {
        scenario.__name__: scenario(rank, world)
        for scenario in (
            many_rewires,
            like_one_process,
            dense_gradient,
            followed_gradient,
            mismatch_after_growth,
            mismatch_at_the_start,
            skipped_layer,
            bytes_on_the_wire,
            handed_over,
            no_wrapper_known,
        )
    }
    results["fingerprint"] = replicas.fingerprint(network()[0].topology)
    torch.save(results, Path(sys.argv[1]) / f"rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()
    # A thread of gloo may still hold tensors of the last collective, and dropping them without an
    # interpreter aborts the process: https://github.com/pytorch/pytorch/pull/179291
    os._exit(0)


if __name__ == "__main__":
    main()
