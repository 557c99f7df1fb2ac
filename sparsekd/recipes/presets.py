"""The recipes that ship: published hyper-parameters, and two sized for a laptop."""

from __future__ import annotations

from collections.abc import Mapping

from sparsekd.recipes.config import DataChoice, DistillationChoice, ModelChoice, Recipe
from sparsekd.train import Training


def _rates(*rounds: int) -> tuple[float, ...]:
    """Return the sparsities reached by pruning 20 % of the rest so many times, to 4 digits."""
    return tuple(round(1 - 0.8**k, 4) for k in rounds)


_DEMO = Recipe(
    name="demo",
    description="digits, ResNet-20: LT, Reinit and KD ticket at three sparsities, in minutes",
    data=DataChoice("digits"),
    model=ModelChoice("resnet20"),
    training=Training(epochs=12, batch_size=64, schedule="cosine", warmup=1, augment=False),
    methods=("lt", "reinit", "kd"),
    sparsities=(0.8, 0.9, 0.95),
)

_FASHION_MNIST = Recipe(
    name="fashion-mnist",
    description="Fashion-MNIST, ResNet-20: LT against KD ticket at 90 % and 98 %, three seeds",
    data=DataChoice("fashion-mnist"),
    model=ModelChoice("resnet20"),
    training=Training(epochs=10, batch_size=128, schedule="cosine", warmup=1),
    methods=("lt", "kd"),
    sparsities=(0.9, 0.98),
    seeds=3,
)

# arXiv 2101.03255 and its code; the KL term is a mean over batch and classes in the CIFAR code.
_KD_TICKET_CIFAR10 = Recipe(
    name="kd_ticket_cifar10",
    description="CIFAR-10, bottleneck ResNet-56, as published: 182 epochs, T=5, element-mean KL",
    data=DataChoice("cifar10", val_fraction=0.1),
    model=ModelChoice("resnet56", bottleneck=True),
    training=Training(
        epochs=182,
        batch_size=128,
        lr=0.1,
        weight_decay=2e-4,
        milestones=(90, 135),
    ),
    kd=DistillationChoice(temperature=5.0, alpha=0.9, reduction="mean"),
    methods=("lt", "reinit", "rewind", "kd", "kd-rewind"),
    sparsities=_rates(*range(1, 17)),
    rewind_epoch=33,
)

_KD_TICKET_IMAGENET = Recipe(
    name="kd_ticket_imagenet",
    description="ImageNet folder, ResNet-50, as published: 90 epochs, T=4, distilled to epoch 60",
    data=DataChoice("imagefolder", image_size=224, scale=(0.1, 1.0), ratio=(0.8, 1.25)),
    model=ModelChoice("resnet50", stem="imagenet"),
    training=Training(
        epochs=90,
        batch_size=512,
        lr=0.4,
        weight_decay=1e-4,
        milestones=(30, 60, 80),
        warmup=5,
    ),
    kd=DistillationChoice(temperature=4.0, alpha=0.9, reduction="batchmean", until=60),
    methods=("lt", "rewind", "kd", "kd-rewind"),
    sparsities=_rates(2, 4, 6, 8, 10),
    rewind_epoch=6,
)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (_DEMO, _FASHION_MNIST, _KD_TICKET_CIFAR10, _KD_TICKET_IMAGENET)
}


def get(name: str) -> Recipe:
    """Return a preset by name; "-" and "_" count as the same.

    Args:
        name: as `sparsekd recipes` lists it.

    Returns:
        The recipe.

    Raises:
        ValueError: there is no such recipe.

    Example:
        >>> get("demo").model.name
        'resnet20'
    """
    for recipe in RECIPES.values():
        if recipe.name.replace("_", "-") == name.replace("_", "-"):
            return recipe
    raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
