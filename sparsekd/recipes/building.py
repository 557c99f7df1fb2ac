"""The network and the data set of a recipe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekd import data, models
from sparsekd.errors import DataError
from sparsekd.recipes.config import DataChoice, ModelChoice


def build_model(
    choice: ModelChoice, dataset: data.Dataset, seed: int, sparsity: float | None = None
) -> nn.Module:
    """Build the dense network of a recipe for a data set.

    Args:
        choice: the network.
        dataset: gives the number of classes and of input channels.
        seed: of the initialisation; torch's global generator is left as it was.
        sparsity: None for the network itself; a number for the narrower one that takes as many
            bits as the network does at this sparsity.

    Returns:
        The network.

    Raises:
        ValueError: the network cannot be built for these images.
    """
    _known("model.name", choice.name, models.names())
    options: dict[str, Any] = {"stem": choice.stem, "bottleneck": choice.bottleneck}
    options = {name: value for name, value in options.items() if value is not None}
    channels, side, _ = dataset.input_shape
    if channels != 3:
        options["in_channels"] = channels
    if choice.name.startswith(("lenet", "vit")):
        options["input_size"] = side
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if sparsity is not None:
                return models.small_dense(
                    choice.name, sparsity, num_classes=dataset.num_classes, **options
                )
            return models.build(choice.name, num_classes=dataset.num_classes, **options)
        except TypeError as error:
            raise ValueError(f"model: {choice.name} does not fit {dataset.name}: {error}") from None


def load_data(choice: DataChoice, root: Path | None, workers: int | None = None) -> data.Dataset:
    """Load the data set of a recipe.

    Args:
        choice: the data set.
        root: folder of its files, or None for its default.
        workers: processes that decode the images of a folder, as in `sparsekd.data.Samples`.

    Returns:
        The data set.

    Raises:
        ValueError: there is no such data set.
        DataError: the files are missing or damaged, or hold too few images.
    """
    _known("data.name", choice.name, data.names())
    fields = {"image_size": choice.image_size, "scale": choice.scale, "ratio": choice.ratio}
    options: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if choice.name == "imagefolder":
        options["workers"] = workers
    elif options:
        field = min(options)
        raise ValueError(
            f"data.{field}: only imagefolder has it; --set data.{field}=none for {choice.name}"
        )
    dataset = data.load(choice.name, root=root, val_fraction=choice.val_fraction, **options)
    wanted = choice.train_images
    if wanted is None:
        return dataset
    if wanted > len(dataset.train):
        raise DataError(
            f"data.train_images: expected at most {len(dataset.train)} for {dataset.name}, got "
            f"{wanted}; --set data.train_images=none trains on all"
        )
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    return replace(dataset, train=dataset.train.subset(order[:wanted].sort().values))


def _known(field: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        raise ValueError(f"{field}: expected one of {', '.join(names)}; got {name!r}")
