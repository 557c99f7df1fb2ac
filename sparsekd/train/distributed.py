"""Training in several processes: their ranks, and the few collectives the trainer needs.

torchrun starts the processes; each trains on its share of every batch. Every rank runs the same
code and comes to the same decisions; rank 0 alone writes files. Without torchrun there is one rank,
and all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class LostRank(RuntimeError):
    """A process of the job that has died or cannot be reached."""


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; without torchrun do nothing.

    Raises:
        LostRank: a collective failed because another process is gone.

    Example:
        >>> with process_group():
        ...     rank(), ranks()
        (0, 1)
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store over restarts, with the addresses of processes that are gone. Its
        # counter tells attempts apart, but only on one machine is it the same for all ranks.
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(store=store, rank=number, world_size=count)
    name = f"rank {rank()} of {ranks()}"
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            first_line = str(error).partition("\n")[0]
            raise LostRank(f"{name}: another rank is gone or out of reach: {first_line}") from error
        raise
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, 0 if there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait() -> None:
    """Wait until every rank has called this."""
    if ranks() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Return, on every rank, whether `flag` is set on any of them."""
    return bool(total({"flags": float(flag)})["flags"])


def total(sums: Mapping[str, float]) -> dict[str, float]:
    """Sum numbers over all ranks, key by key."""
    if ranks() == 1:
        return dict(sums)
    numbers = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(numbers)
    return dict(zip(sums, numbers.tolist(), strict=True))


def collect(tensor: Tensor) -> list[Tensor]:
    """Gather a tensor from every rank, in the order of ranks; its shape is the same everywhere."""
    if ranks() == 1:
        return [tensor]
    everyone = [torch.empty_like(tensor) for _ in range(ranks())]
    dist.all_gather(everyone, tensor)
    return everyone


def replicate(model: nn.Module) -> nn.Module:
    """Wrap a model so that its gradients are averaged over all ranks; one rank needs no wrapper."""
    return DistributedDataParallel(model) if ranks() > 1 else model
