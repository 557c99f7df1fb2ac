"""The recipes that ship: published hyper-parameters, and others sized for a laptop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sparsekd.dst import METHODS, Dynamics, Method
from sparsekd.recipes.config import DataChoice, ModelChoice, Recipe
from sparsekd.tickets import DistillationConfig, Superposition
from sparsekd.tickets.pruning import PRUNE_RATE
from sparsekd.train import Training


def _rates(*rounds: int) -> tuple[float, ...]:
    """Return the sparsities after so many rounds of iterative pruning, to 4 digits."""
    return tuple(round(1 - (1 - PRUNE_RATE) ** k, 4) for k in rounds)


# Three cycles of an epoch, 15 to 469 steps in place of the published 3,100, so each moves fewer
# weights than the published half.
_SHORT_CYCLES = Superposition(cycle_fraction=0.3, cycle_epochs=1, drop_fraction=0.2)

# 12 steps an epoch. First and last layer stay dense, as usual at uniform sparsity: at 98 % they
# would keep a handful of weights, and together they are 0.1 % of all.
_DEMO = Recipe(
    name="demo",
    description="digits, WRN-22-2: tickets and RigL at 90 %, 95 % and 98 %, in minutes",
    data=DataChoice("digits"),
    model=ModelChoice("wrn22_2"),
    training=Training(epochs=7, milestones=(4, 6), warmup=1, augment=False),
    dynamics=Dynamics(every=10, distribution="uniform"),
    sup=replace(_SHORT_CYCLES, cycle_fraction=0.375),
    methods=("reinit", "lt", "kd", "rigl", "sup-rigl"),
    sparsities=(0.9, 0.95, 0.98),
    seeds=3,
    skip=("conv1", "fc"),
)

_FASHION_MNIST = Recipe(
    name="fashion-mnist",
    description="Fashion-MNIST, ResNet-20: LT against KD ticket at 90 % and 98 %, three seeds",
    data=DataChoice("fashion-mnist"),
    model=ModelChoice("resnet20"),
    training=Training(epochs=10, schedule="cosine", warmup=1),
    sparsities=(0.9, 0.98),
    seeds=3,
)

# Transformers of the published shapes, on data that every installation has. First and last layer
# stay dense, which is 0.1 % and 0.7 % of all. Tickets mask linear layers too: there are no others.
_VIT = Recipe(
    name="vit",
    description="digits, ViT-Ti: RigL and KD ticket at 90 %",
    data=DataChoice("digits"),
    model=ModelChoice("vit_tiny"),
    training=Training(
        epochs=20,
        batch_size=16,
        lr=0.01,
        schedule="cosine",
        warmup=2,
        weight_decay=1e-4,
        augment=False,
    ),
    dynamics=Dynamics(every=100),
    layers="all",
    methods=("rigl", "kd"),
    skip=("patch_embed", "head"),
)

_CHAR_GPT = Recipe(
    name="char_gpt",
    description="characters of Python's own documentation, a small GPT-2: RigL and KD ticket at "
    "90 %",
    data=DataChoice("text"),
    model=ModelChoice("char_gpt"),
    training=Training(
        epochs=4, batch_size=64, lr=0.05, schedule="cosine", warmup=1, weight_decay=1e-4
    ),
    dynamics=Dynamics(every=50),
    layers="all",
    methods=("rigl", "kd"),
    skip=("head",),
)

# arXiv 2101.03255 and its code; the KL term is a mean over batch and classes in the CIFAR code.
_KD_TICKET_CIFAR10 = Recipe(
    name="kd_ticket_cifar10",
    description="CIFAR-10, bottleneck ResNet-56, KD ticket as published: 182 epochs, T=5, "
    "element-mean KL; but the 5,000 images held out are drawn, not the first",
    data=DataChoice("cifar10", val_fraction=0.1),
    model=ModelChoice("resnet56", bottleneck=True),
    training=Training(epochs=182, weight_decay=2e-4, milestones=(90, 135)),
    kd=DistillationConfig(temperature=5.0, reduction="mean"),
    methods=("lt", "reinit", "rewind", "kd", "kd-rewind"),
    sparsities=_rates(*range(1, 17)),
    rewind_epoch=33,
)

_KD_TICKET_IMAGENET = Recipe(
    name="kd_ticket_imagenet",
    description="ImageNet folder, ResNet-50, KD ticket as published: 90 epochs, T=4, distilled to "
    "epoch 60",
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
    kd=DistillationConfig(until=60),
    methods=("lt", "rewind", "kd", "kd-rewind"),
    sparsities=_rates(2, 4, 6, 8, 10),
    rewind_epoch=6,
)

# arXiv 2205.15322 and its code: 226 + 24 epochs; milestones at half and three quarters of the 226,
# to which the schedule is squeezed when the cycles follow it. Cycles begin at the rate that this
# leaves, 0.001. Its CIFAR-100 loader trains on all 50,000 images and validates on the test split.
_SUP_TICKETS_CIFAR100 = Recipe(
    name="sup_tickets_cifar100",
    description="CIFAR-100, ResNet-50, Sup-tickets as published: 95 %, 250 epochs, 3 cycles of 8; "
    "but SET grows at random, in its code by gradient",
    data=DataChoice("cifar100"),
    model=ModelChoice("resnet50", stem="cifar"),
    training=Training(epochs=250, milestones=(125, 187)),
    dynamics=METHODS["sup-granet"].dynamics,
    sup=Superposition(prune_each=True),
    methods=("set", "sup-set", "rigl", "sup-rigl", "sup-granet"),
    sparsities=(0.95,),
)

# Likewise 92 + 8 epochs; squeezed, the milestones are the published 30, 60 and 85.
_SUP_TICKETS_IMAGENET = Recipe(
    name="sup_tickets_imagenet",
    description="ImageNet folder, ResNet-50, Sup-tickets as published: 90 %, 4 cycles of 2 epochs; "
    "but cycles go on from the trained network, in its code from the average",
    data=DataChoice("imagefolder", image_size=224),
    model=ModelChoice("resnet50", stem="imagenet"),
    training=Training(
        epochs=100,
        weight_decay=1e-4,
        milestones=(33, 65, 92),
        warmup=5,
        label_smoothing=0.1,
    ),
    dynamics=replace(METHODS["sup-rigl"].dynamics, every=4000),
    sup=Superposition(cycle_fraction=0.08, cycle_epochs=2, prune_each=True),
    methods=("rigl", "sup-rigl"),
)


# arXiv 1911.11134: 32,000 steps of 4,096 images; 25,000 of them move the topology.
_RIGL_IMAGENET = Recipe(
    name="rigl_imagenet",
    description="ImageNet folder, ResNet-50, RigL as published: ERK, 80 % and 90 %, 102 epochs",
    data=DataChoice("imagefolder", image_size=224),
    model=ModelChoice("resnet50", stem="imagenet"),
    training=Training(
        epochs=102,
        batch_size=4096,
        lr=1.6,
        nesterov=True,
        weight_decay=1e-4,
        decay_norm_and_bias=False,
        milestones=(30, 70, 90),
        warmup=5,
        label_smoothing=0.1,
    ),
    dynamics=replace(METHODS["rigl"].dynamics, until=25 / 32),
    methods=("static", "set", "rigl", "small-dense"),
    sparsities=(0.8, 0.9),
)

# arXiv 1911.11134, its code and 2103.15767: the rate falls by 5 every 30,000 steps of 390 an epoch;
# updates end, and GMP reaches its sparsity, at step 75,000. The first convolution stays dense.
_RIGL_CIFAR10 = Recipe(
    name="rigl_cifar10",
    description="CIFAR-10, WRN-22-2, RigL as published: 50 %, 80 % and 90 %, 250 epochs; but GMP "
    "prunes every 100 steps, published every 1,000, and crops are padded with zeros, in its code "
    "with mirrored edges",
    data=DataChoice("cifar10"),
    model=ModelChoice("wrn22_2"),
    training=Training(
        epochs=250,
        nesterov=True,
        decay_norm_and_bias=False,
        milestones=(77, 153, 230),
        gamma=0.2,
    ),
    dynamics=replace(METHODS["gmp"].dynamics, every=100, until=75_000 / 97_656),
    skip=("conv1",),
    methods=("static", "set", "rigl", "gmp", "small-dense"),
    sparsities=(0.5, 0.8, 0.9),
    seeds=3,
)

# arXiv 2106.10404 and its code: pruning ends at epoch 110, moves go on to the end, for all methods.
# Its CIFAR-100 loader trains on all 50,000 images, in batches of 100.
_GRANET_CIFAR100 = Recipe(
    name="granet_cifar100",
    description="CIFAR-100, VGG-19, GraNet as published: 90 %, 95 % and 98 %, 160 epochs; but the "
    "drop fraction of RigL falls to 0, in its code to 0.005",
    data=DataChoice("cifar100"),
    model=ModelChoice("vgg19_bn"),
    training=Training(epochs=160, batch_size=100, nesterov=True, milestones=(80, 120)),
    dynamics=METHODS["granet"].dynamics,
    methods=("granet", "gmp", "rigl", "snip", "grasp", "synflow"),
    sparsities=(0.9, 0.95, 0.98),
    seeds=3,
)

# 157 steps an epoch, so updates come every 40 of them. The rate falls in steps, as cycles begin at
# the last one.
_COMPARE = Recipe(
    name="compare",
    description="Fashion-MNIST, ResNet-20: methods side by side at 95 % and 98 %, three seeds",
    data=DataChoice("fashion-mnist", val_fraction=0.05, train_images=20_000),
    model=ModelChoice("resnet20"),
    training=Training(epochs=16, milestones=(8, 12), warmup=1),
    dynamics=Dynamics(every=40),
    own_dynamics=True,
    sup=replace(_SHORT_CYCLES, cycle_fraction=3 / 16),
    methods=("kd", "sup-rigl", "rigl", "set", "static", "gmp"),
    sparsities=(0.95, 0.98),
    seeds=3,
)


def _alone(method: Method) -> Recipe:
    """Return one method on all of Fashion-MNIST, sized for a machine of two cores."""
    training = _FASHION_MNIST.training
    if method.superpose:  # cycles begin at the host's last rate, which is not to be 0
        training = replace(training, schedule="step", milestones=(5, 8))
    return replace(
        _FASHION_MNIST,
        training=training,
        name=method.name,
        description=f"Fashion-MNIST, ResNet-20: {method.label} at 95 % and 98 %",
        dynamics=replace(method.dynamics, every=min(method.dynamics.every, 100)),
        sup=_SHORT_CYCLES,
        methods=(method.name,),
        sparsities=(0.95, 0.98),
        seeds=1,
    )


def _alone_where(condition: Callable[[Method], bool]) -> tuple[Recipe, ...]:
    return tuple(_alone(method) for method in METHODS.values() if condition(method))


GROUPS: Mapping[str, tuple[Recipe, ...]] = {
    "To begin with": (_DEMO, _FASHION_MNIST, _COMPARE, _VIT, _CHAR_GPT),
    "As published; the data are to be downloaded": (
        _KD_TICKET_CIFAR10,
        _KD_TICKET_IMAGENET,
        _SUP_TICKETS_CIFAR100,
        _SUP_TICKETS_IMAGENET,
        _RIGL_CIFAR10,
        _RIGL_IMAGENET,
        _GRANET_CIFAR100,
    ),
    "One method: tickets from a dense run": _alone_where(
        lambda method: method.needs_dense and method.updater is None
    ),
    "One method: masks that stay": _alone_where(
        lambda method: not method.needs_dense and method.updater is None
    ),
    "One method: topologies that move": _alone_where(
        lambda method: method.updater is not None and not method.superpose
    ),
    "One method: Sup-tickets": _alone_where(lambda method: method.superpose),
}
"""The recipes, as `sparsekd recipes` lists them."""

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe for members in GROUPS.values() for recipe in members
}


def get(name: str) -> Recipe:
    """Return a preset by name; "-" and "_" count as the same, and "kd-ticket" is "kd".

    Args:
        name: as `sparsekd recipes` lists it.

    Returns:
        The recipe.

    Raises:
        ValueError: there is no such recipe.

    Example:
        >>> get("demo").model.name
        'wrn22_2'
    """
    wanted = name.replace("_", "-")
    for recipe in RECIPES.values():
        if recipe.name.replace("_", "-") in (wanted, wanted.removesuffix("-ticket")):
            return recipe
    raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
