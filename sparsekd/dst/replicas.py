"""Data-parallel replicas with equal topologies.

Every function is a collective where `torch.distributed` is initialised, and free elsewhere.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsekd import _torch
from sparsekd.errors import TopologyError, UnsupportedError
from sparsekd.topology import Topology


def several() -> bool:
    """Return whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_(tensor: Tensor) -> Tensor:
    """Replace a tensor by its mean over all ranks, the same bits on each of them.

    Growth scores are magnitudes of this mean: that of the magnitudes would rank by noise.
    """
    if several():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def check_topologies(topologies: Mapping[str, Topology]) -> None:
    """Check that all ranks hold the same topology in every layer.

    Args:
        topologies: by layer.

    Raises:
        TopologyError: they do not; on every rank, naming layers and ranks.
    """
    if several():
        check_equal(
            {name: fingerprint(topology) for name, topology in topologies.items()},
            "topologies differ between ranks, which need the same seeds and the same start",
            next(iter(topologies.values())).device,
        )


def check_equal(numbers: Mapping[str, int], problem: str, device: torch.device) -> None:
    """Check that all ranks hold the same number for every layer.

    Two numbers a layer go over the wire, however many ranks there are; where they differ, those of
    all ranks do.

    Args:
        numbers: in [0, 2^63), by layer.
        problem: what it means if they differ.
        device: that the process group works on.

    Raises:
        TopologyError: they differ; on every rank, naming layers and ranks.
    """
    if not several():
        return
    mine = torch.tensor(list(numbers.values()), device=device)
    extremes = torch.stack([mine, -mine])
    dist.all_reduce(extremes, dist.ReduceOp.MIN)
    differ = (extremes[0] != -extremes[1]).tolist()
    if not any(differ):
        return
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone, 1).tolist()
    lines = [
        f"{name} on {_ranks(row)}"
        for name, row, wrong in zip(numbers, table, differ, strict=True)
        if wrong
    ]
    raise TopologyError(f"rank {dist.get_rank()}: {problem}: {'; '.join(lines)}")


def _ranks(row: list[int]) -> str:
    groups: dict[int, list[str]] = {}
    for rank, number in enumerate(row):
        groups.setdefault(number, []).append(str(rank))
    return " against ".join(f"rank {', '.join(ranks)}" for ranks in groups.values())


def fingerprint(topology: Topology) -> int:
    """Hash a topology to 63 bits, the same in every process.

    Example:
        >>> mask = torch.eye(3, dtype=torch.bool)
        >>> fingerprint(Topology.from_mask(mask)) == fingerprint(Topology.from_mask(mask.clone()))
        True
    """
    digest = hashlib.blake2b(repr(tuple(topology.shape)).encode(), digest_size=8)
    for indices in (topology.crow_indices, topology.col_indices):
        digest.update(indices.cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside a DistributedDataParallel wrapper, any other as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class Wrappers:
    """The DistributedDataParallel wrappers of a model, as far as they are known.

    Args:
        model: a wrapper, or a module that may hold some.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._known: list[weakref.ref[DistributedDataParallel]] | None = None
        found = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        if found:
            self.name(*found)

    @property
    def named(self) -> bool:
        """Whether the wrappers are known, or known not to exist."""
        return self._known is not None

    def name(self, *wrappers: DistributedDataParallel) -> None:
        """Set the wrappers of the model, in place of those known before.

        Raises:
            ValueError: one is no DistributedDataParallel, or wraps another model.
        """
        for wrapper in wrappers:
            if not isinstance(wrapper, DistributedDataParallel):
                kind = type(wrapper).__name__
                raise ValueError(f"wrappers: expected DistributedDataParallel, got a {kind}")
            if set(self._model.parameters()).isdisjoint(wrapper.parameters()):
                raise ValueError("wrappers: expected those of the updater's model, got another's")
        self._known = [weakref.ref(wrapper) for wrapper in wrappers]

    def for_change(self, who: str) -> list[DistributedDataParallel]:
        """Return the wrappers to fit once `who` has changed the size of parameters.

        Raises:
            UnsupportedError: none is known, nor that there is none.
        """
        known = [wrapper for ref in self._known or () if (wrapper := ref()) is not None]
        if not known and self._known != []:
            raise UnsupportedError(
                f"{who} changes the number of nonzeros, which the gradient buckets of "
                "DistributedDataParallel must follow, but knows no wrapper of the model; give the "
                f"wrapper instead of the model, as in {who}(network, ...), or call "
                "attach(network) once there is one; attach() says that there is none"
            )
        return known


def rebuild_buckets(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Fit DistributedDataParallel wrappers to the sizes their parameters have now.

    A wrapper lays out gradient buckets once, when it is made; a method that changes the number of
    nonzeros makes that layout wrong. The parameters stay the same objects and nothing is sent.

    Args:
        wrappers: of models whose parameters have changed in size.
    """
    for wrapper in wrappers:
        _torch.rebuild_buckets(wrapper)
