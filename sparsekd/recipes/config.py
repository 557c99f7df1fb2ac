"""The fields of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsekd.dst import METHODS, Dynamics, Method, find_method
from sparsekd.dst.registry import Layers
from sparsekd.errors import UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.sparsity import check_fixed_density
from sparsekd.tickets import DistillationConfig, Superposition
from sparsekd.tickets.pipeline import Init
from sparsekd.tickets.pruning import PRUNE_RATE
from sparsekd.train import Training

_SHARED = ("distribution", "every", "backward")


@dataclass(frozen=True)
class DataChoice:
    """A data set, by name.

    Args:
        name: as in `sparsekd.data.load`.
        val_fraction: share of the training images held out to watch training; 0 trains on all.
        train_images: train on so many images, chosen once for all seeds; None for all.
        image_size: of "imagefolder"; None for its default, as below.
        scale: range of the crop's share of the image, of "imagefolder".
        ratio: range of the crop's aspect ratio, of "imagefolder".
    """

    name: str
    val_fraction: float = 0.0
    train_images: int | None = None
    image_size: int | None = None
    scale: tuple[float, ...] | None = None
    ratio: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.train_images is not None and self.train_images < 1:
            raise ValueError(f"train_images: expected at least 1, got {self.train_images}")


@dataclass(frozen=True)
class ModelChoice:
    """A network, by name.

    Args:
        name: as in `sparsekd.models.build`.
        stem: of the ImageNet-style networks; None where the network has no such choice.
        bottleneck: of ResNet-56 and ResNet-110; None where the network has no such choice.
    """

    name: str
    stem: str | None = None
    bottleneck: bool | None = None


@dataclass(frozen=True)
class Recipe:
    """An experiment: ways to train one network sparse, over seeds.

    Args:
        name: of the recipe.
        description: one line for `sparsekd recipes`.
        data: the data set.
        model: the network.
        training: hyper-parameters of every run, the dense network's included.
        kd: of the methods that distil.
        dynamics: of the methods that move their topology, and of random masks.
        own_dynamics: each method moves its topology as in its own paper (`Method.dynamics`); of
            `dynamics` only `distribution`, `every` and `backward` are read.
        sup: of Sup-tickets.
        methods: names from `sparsekd.dst.METHODS`, where "kd-ticket" is "kd", and "dense",
            which runs in any case where another method needs it.
        sparsities: fractions of the weights to prune in the layers that a method masks.
        seeds: number of repetitions.
        first_seed: of the first repetition; the others follow. Several machines can share an
            experiment this way.
        rewind_epoch: k of the methods that rewind.
        prune_rate: fraction of the remaining weights pruned in a round of the iterative methods.
        layout: of the sparse layers, as `sparsekd.Layout.parse` reads it: "csr", "bcsr:32".
        layers: that get masks, "convolutions" or "all", which is linear layers too; None leaves it
            to each method, as in its paper.
        skip: names of layers that stay dense in every method, or fnmatch patterns of them.
        init: of methods that start from no dense run, and of Reinit: "keep" for the network's own,
            "sparse" for that scaled to the active inputs of each neuron.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> recipe = Recipe("mine", "", DataChoice("digits"), ModelChoice("resnet20"), Training(4))
        >>> recipe.with_epochs(8).training.epochs
        8
    """

    name: str
    description: str
    data: DataChoice
    model: ModelChoice
    training: Training
    kd: DistillationConfig = field(default_factory=DistillationConfig)
    dynamics: Dynamics = field(default_factory=Dynamics)
    sup: Superposition = field(default_factory=Superposition)
    methods: tuple[str, ...] = ("lt", "kd")
    sparsities: tuple[float, ...] = (0.9,)
    seeds: int = 1
    first_seed: int = 0
    rewind_epoch: int = 1
    prune_rate: float = PRUNE_RATE
    layout: str = "csr"
    layers: Layers | None = None
    skip: tuple[str, ...] = ()
    init: Init = "keep"
    own_dynamics: bool = False

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name == "..":  # it names a folder of runs
            raise ValueError(f"name: expected one without slashes, got {self.name!r}")
        names = (name if name == "dense" else find_method(name).name for name in self.methods)
        methods = tuple(dict.fromkeys(names))
        object.__setattr__(self, "methods", methods)
        try:
            object.__setattr__(self, "layout", str(Layout.parse(self.layout)))
        except UnsupportedError as error:
            raise ValueError(str(error)) from None
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise ValueError(f"sparsities: expected numbers in [0, 1), got {sparsity}")
        if self.seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {self.seeds}")
        if self.first_seed < 0:
            raise ValueError(f"first_seed: expected at least 0, got {self.first_seed}")
        if not 0 <= self.rewind_epoch <= self.training.epochs:
            raise ValueError(
                f"rewind_epoch: expected 0 to {self.training.epochs}, got {self.rewind_epoch}"
            )
        if any(name != "dense" and METHODS[name].superpose for name in methods):
            self.sup.tail(self.training.epochs)  # refuses cycles that do not fit
        if self.own_dynamics and self.dynamics != replace(Dynamics(), **_shared(self.dynamics)):
            raise ValueError(
                f"own_dynamics: leaves only {', '.join(_SHARED)} of dynamics to the recipe; set it "
                "to false to give every method the same"
            )
        if not 0 < self.prune_rate < 1:
            raise ValueError(f"prune_rate: expected a number in (0, 1), got {self.prune_rate}")

    def dynamics_of(self, method: Method) -> Dynamics:
        """Return the hyper-parameters by which a method moves its topology in this recipe."""
        if not self.own_dynamics:
            return self.dynamics
        return replace(method.dynamics, **_shared(self.dynamics))

    def check_layout(self) -> None:
        """Check that every sparsity is one that the layout allows; ValueError otherwise."""
        for sparsity in self.sparsities:
            check_fixed_density(Layout.parse(self.layout), sparsity)

    def with_dynamics(self, **changes: Any) -> Recipe:
        """Return the recipe with fields of its `dynamics` changed."""
        return replace(self, dynamics=replace(self.dynamics, **changes))

    def with_epochs(self, epochs: int) -> Recipe:
        """Return the recipe at another length, every epoch number scaled in proportion.

        A shorter run also updates its topology more often, to have as many updates; a longer one
        keeps the distance between them, and has more, as published.

        Args:
            epochs: new length of the schedule.

        Returns:
            The new recipe.
        """
        share = epochs / self.training.epochs
        until = self.kd.until
        every = max(1, round(self.dynamics.every * min(share, 1)))
        return replace(
            self,
            training=self.training.scaled(epochs),
            kd=replace(self.kd, until=None if until is None else max(1, round(until * share))),
            dynamics=replace(self.dynamics, every=every),
            sup=replace(self.sup, cycle_epochs=max(1, round(self.sup.cycle_epochs * share))),
            rewind_epoch=round(self.rewind_epoch * share),
        )


def _shared(dynamics: Dynamics) -> dict[str, Any]:
    return {name: getattr(dynamics, name) for name in _SHARED}
