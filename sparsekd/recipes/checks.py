"""What would go wrong in an experiment, found before anything is written."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparsekd.data import Dataset
from sparsekd.dst import METHODS, Method
from sparsekd.layouts import Layout
from sparsekd.nn import SparseLinear
from sparsekd.recipes.building import build_model
from sparsekd.recipes.config import Recipe
from sparsekd.tickets import SupTickets, check_layout, masked_layers
from sparsekd.tickets.ticket import attach

_WANTED_UPDATES = 10  # of the value that a message suggests


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Check that every run of a recipe can do what its name says.

    A method that moves its topology is refused if no update, or no cycle of Sup-tickets, falls into
    the run: its rows would be those of another method.

    Args:
        recipe: of the experiment.
        dataset: as `load_data` gives it.

    Raises:
        ValueError: a setting is out of range, the network does not take these images, or a method
            would never update; the message names the setting that mends it.
        UnsupportedError: a method cannot keep the layout.

    Example:
        >>> from sparsekd.recipes import get, load_data
        >>> recipe = get("demo")
        >>> check(recipe, load_data(recipe.data, None))
    """
    methods = [METHODS[name] for name in recipe.methods if name != "dense"]
    if methods and not recipe.sparsities:
        raise ValueError(
            f"sparsities: expected at least one for {methods[0].name}; "
            "--method dense trains the dense network alone"
        )
    recipe.check_layout()
    _check_network(recipe, dataset, methods)
    steps = len(dataset.train.batches(recipe.training.batch_size))
    for method in methods:
        check_layout(method, Layout.parse(recipe.layout))
        if method.updater is not None:
            _check_updates(recipe, method, steps)


def _check_network(recipe: Recipe, dataset: Dataset, methods: list[Method]) -> None:
    """Build the networks without memory and pass two images through their shapes."""
    narrow = recipe.sparsities if any(method.start == "none" for method in methods) else ()
    with torch.device("meta"), torch.no_grad():
        for sparsity in (None, *narrow):
            model = build_model(recipe.model, dataset, 0, sparsity).eval()
            if sparsity is None:
                for method in methods:
                    masked_layers(method, model, recipe.layers, recipe.skip)
            try:
                model(torch.empty(2, *dataset.input_shape))
            except (RuntimeError, ValueError) as error:
                images = "x".join(map(str, dataset.input_shape))
                raise ValueError(
                    f"model.name={recipe.model.name}: does not take the {images} images of "
                    f"{dataset.name}: {error}"
                ) from None


def _check_updates(recipe: Recipe, method: Method, steps: int) -> None:
    epochs = recipe.training.epochs - method.start_epoch(recipe.rewind_epoch)
    if method.superpose and recipe.sup.cycles(epochs, steps).count == 0:
        fits = math.ceil(1000 * recipe.sup.cycle_epochs / epochs) / 1000
        mends = (
            f"--set sup.cycle_fraction={fits:g} makes room for one"
            if fits < 1
            else "train for more --epochs"
        )
        raise ValueError(
            f"{method.name}: 0 cycles of Sup-tickets fit into the run: "
            f"sup.cycle_epochs={recipe.sup.cycle_epochs} is more than the share "
            f"sup.cycle_fraction={recipe.sup.cycle_fraction:g} of its {epochs} epochs; {mends}"
        )
    if updates(recipe, method, steps, enough=1):
        return
    dynamics = recipe.dynamics_of(method)
    limit = round(dynamics.until * epochs * steps)
    every = max(1, limit // (_WANTED_UPDATES + 1))
    made = updates(recipe.with_dynamics(every=every), method, steps)
    mends = (
        f"--set dynamics.every={every} makes {made}"
        if made
        else "train for more --epochs, or raise dynamics.until"
    )
    raise ValueError(
        f"{method.name}: 0 updates of the topology fall into the run, which has {epochs * steps} "
        f"steps, with dynamics.every={dynamics.every} and dynamics.until={dynamics.until:g}; "
        f"{mends}"
    )


def updates(recipe: Recipe, method: Method, steps: int, enough: float = math.inf) -> int:
    """Count the updates that a method makes in a run, less those of the cycles of Sup-tickets.

    The count is that of the method's own schedule, on a layer of no account.

    Args:
        recipe: of the run.
        method: with an updater.
        steps: of an epoch.
        enough: stop counting here.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> from sparsekd.recipes import get
        >>> updates(get("rigl"), METHODS["rigl"], steps=469)
        35
    """
    sparsity = max(recipe.sparsities)
    epochs = recipe.training.epochs - method.start_epoch(recipe.rewind_epoch)
    layer = SparseLinear(64, 64, sparsity=method.start_sparsity(sparsity), seed=0)
    moving = attach(
        method,
        nn.Sequential(layer),
        torch.optim.SGD(layer.parameters(), lr=0.1),
        sparsity=sparsity,
        epochs=epochs,
        steps=steps,
        dynamics=recipe.dynamics_of(method),
        superposition=recipe.sup,
        seed=0,
    )
    assert moving is not None
    if isinstance(moving, SupTickets):
        schedule, total = moving.dst.schedule, moving.cycles.first_phase
    else:
        schedule, total = moving.schedule, epochs * steps
    found = 0
    for iteration in range(1, total + 1):
        found += schedule(iteration) is not None
        if found >= enough:
            break
    return found
