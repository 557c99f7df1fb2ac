"""The settings of every study, fixed before a run of it.

They come from pilots on seeds 0 to 2; the studies of LeNet-300-100 run seeds 3 to 7, those of
convolutions 3 to 5. A study has columns, each a recipe that runs in a folder of its own, and pairs
whose differences answer its question: the same sparsity and seed, one less the other.

All studies of convolutions together are cut to what two cores train in two hours: at 28x28 the
tickets of ResNet-20 alone would take ten. At these sizes there were no pilots; each says in its
`setting` what it leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsekd.dst import METHODS, Dynamics
from sparsekd.recipes import DataChoice, ModelChoice, Recipe
from sparsekd.tickets import Superposition
from sparsekd.train import Training


@dataclass(frozen=True)
class Study:
    """A question, the runs that answer it, and the differences that do.

    Args:
        question: what the papers claim.
        columns: recipes by name.
        pairs: (column/method, column/method) whose difference is taken, the first less the second,
            at their columns' first, second, ... sparsities.
        setting: what is trained on what, and where that departs from the papers.
        pool: images are averages over patches of this side.
    """

    question: str
    columns: Mapping[str, Recipe]
    pairs: tuple[tuple[str, str], ...]
    setting: str = ""
    pool: int = 1

    def shortened(self) -> Study:
        """Return the study in seconds: a network and one epoch that show only that it runs."""
        return replace(self, columns={n: _shortened(r) for n, r in self.columns.items()})


def _shortened(recipe: Recipe) -> Recipe:
    sup = replace(recipe.sup, cycle_epochs=1, cycle_count=1)
    short = replace(
        recipe.with_epochs(4),
        data=replace(recipe.data, train_images=400),
        sparsities=recipe.sparsities[:1],
        seeds=1,
        sup=sup,
    )
    return replace(short, dynamics=replace(short.dynamics, every=2))


def _pairs(column: str, *differences: str) -> tuple[tuple[str, str], ...]:
    """Read "a-b" as method a less method b of one column."""
    return tuple(
        (f"{column}/{a}", f"{column}/{b}")
        for a, _, b in (difference.partition(" less ") for difference in differences)
    )


_MLP = Recipe(
    name="evidence",
    description="LeNet-300-100 on Fashion-MNIST, all three layers sparse",
    data=DataChoice("fashion-mnist"),
    model=ModelChoice("lenet300_100"),
    training=Training(epochs=20, schedule="cosine", augment=False),
    seeds=5,
    first_seed=3,
    layers="all",
)

_MOVING = replace(
    _MLP, methods=("static", "set", "rigl"), sparsities=(0.99, 0.995), dynamics=Dynamics(every=500)
)
_OFTEN = replace(_MOVING, dynamics=Dynamics(every=100))

# The table of the KD-ticket paper, which rewinds to epoch 33 of 182.
_TICKETS = ("lt", "reinit", "kd", "rewind", "lr-rewind", "kd-rewind")
_TICKET_PAIRS = (
    *("kd less lt", "lt less reinit", "rewind less lt", "lr-rewind less rewind"),
    *("kd less rewind", "kd-rewind less kd", "kd-rewind less rewind"),
)
_DISTILLED = replace(
    _MLP,
    data=DataChoice("fashion-mnist", train_images=10_000),
    training=replace(_MLP.training, epochs=40),
    methods=_TICKETS,
    sparsities=(0.95, 0.98, 0.99),
    rewind_epoch=7,
)

# 48 + 12 epochs, three cycles of 4 from 0.01 to 0.05. Its host has the same schedule, or falls to
# 0.001 in the last quarter.
_SUPERPOSED = replace(
    _MLP,
    data=DataChoice("fashion-mnist", train_images=20_000),
    training=Training(epochs=60, milestones=(30,), augment=False),
    sup=Superposition(cycle_count=3, cycle_epochs=4, drop_fraction=0.2),
    methods=("set", "sup-set", "rigl", "sup-rigl"),
    sparsities=(0.98,),
)
_GRANET = replace(METHODS["granet"].dynamics, every=100)

# ResNet-20 where the teacher has something to give: it fits its few images long before the end.
_RESNET = replace(
    _MLP,
    description="ResNet-20 on 1,000 images of Fashion-MNIST at 14x14",
    data=DataChoice("fashion-mnist", train_images=1_000),
    model=ModelChoice("resnet20"),
    training=replace(_MLP.training, epochs=30, batch_size=32),
    methods=_TICKETS,
    sparsities=(0.95, 0.98),
    rewind_epoch=5,
    layers=None,
    seeds=3,
)

# 125 steps an epoch: 2,500, the last 750 at the rate that the cycles begin with, then three cycles
# of 1,000 that move half of the weights, as published.
_DEEP_SUP = replace(
    _SUPERPOSED,
    description="ResNet-20 on 4,000 images of Fashion-MNIST at 14x14",
    data=DataChoice("fashion-mnist", train_images=4_000),
    model=ModelChoice("resnet20"),
    training=Training(epochs=44, batch_size=32, milestones=(14,), augment=False),
    sup=Superposition(cycle_count=3, cycle_epochs=8),
    dynamics=Dynamics(every=50),
    sparsities=(0.95,),
    layers=None,
    seeds=3,
)
_WIDE_SUP = replace(
    _DEEP_SUP,
    description="WRN-22-2 on 4,000 images of Fashion-MNIST at 14x14",
    model=ModelChoice("wrn22_2"),
    methods=("rigl", "sup-rigl"),
)

# The reproduction of RigL (arXiv 2103.15767): GMP from step 700 of 87,891 to 75 %; the first
# convolution dense throughout, so that ERK and uniform masks store as many weights.
_REPRODUCED = replace(
    _RESNET,
    description="ResNet-20 on 2,000 images of Fashion-MNIST at 7x7",
    data=DataChoice("fashion-mnist", train_images=2_000),
    training=replace(_RESNET.training, epochs=15),
    dynamics=Dynamics(every=20, prune_from=700 / 87_891, prune_until=0.75),
    methods=("static", "set", "rigl", "gmp", "small-dense"),
    sparsities=(0.9, 0.95, 0.98),
    skip=("conv1",),
)
_UNIFORM = replace(
    _REPRODUCED,
    dynamics=replace(_REPRODUCED.dynamics, distribution="uniform"),
    methods=("static", "set", "rigl", "rigl-sg", "rigl-sm"),
)
# Uniform masks whose forward pass on 7x7 images costs what ERK's does at `_REPRODUCED.sparsities`.
EQUAL_FLOPS = (0.8391, 0.9211, 0.9685)
_UNIFORM_FLOPS = replace(_UNIFORM, methods=("static", "rigl"), sparsities=EQUAL_FLOPS)


def _annealed(recipe: Recipe) -> Recipe:
    """Return the hosts alone, their rate falling once more at three quarters."""
    milestones = (*recipe.training.milestones, recipe.training.epochs * 3 // 4)
    training = replace(recipe.training, milestones=milestones)
    hosts = tuple(m for m in recipe.methods if not m.startswith("sup-"))
    return replace(recipe, training=training, methods=hosts)


def _superposition(
    moved: Recipe, granet: Recipe | None = None, setting: str = "", pool: int = 1
) -> Study:
    """Compare Sup-tickets with their hosts, which `moved` and `granet` name."""
    columns: dict[str, Recipe] = {}
    pairs: list[tuple[str, str]] = []
    for name, recipe in {"moved": moved, "granet": granet}.items():
        if recipe is None:
            continue
        annealed = _annealed(recipe)
        columns |= {name: recipe, f"{name}-annealed": annealed}
        pairs += [
            (f"{name}/sup-{host}", f"{column}/{host}")
            for host in annealed.methods
            for column in (name, f"{name}-annealed")
        ]
    return Study(
        "Sup-tickets are better than their host, with its schedule and with one annealed further.",
        columns,
        tuple(pairs),
        setting,
        pool,
    )


_FEW = (
    "Three seeds, and images averaged over {0}x{0} patches, because two cores have two hours for "
    "all studies of convolutions. "
)
_CYCLES = (
    "4,000 images, batch 32, no augmentation: 2,500 steps of the host, then three cycles of 1,000 "
    "at rates 0.01 to 0.05 that move half of the weights. The papers train on 50,000 images, and "
    "cycles take 3,100 steps of 128. "
)

STUDIES: Mapping[str, Study] = {
    "moving": Study(
        "RigL is better than SET, SET than static masks, if updates are far enough apart.",
        {"every500": _MOVING, "every100": _OFTEN},
        tuple(
            pair
            for column in ("every500", "every100")
            for pair in _pairs(column, "rigl less set", "set less static", "rigl less static")
        ),
    ),
    "distilled": Study(
        "A KD ticket is better than LT and as good as rewinding; both together are best.",
        {"mlp": _DISTILLED},
        _pairs("mlp", *_TICKET_PAIRS),
    ),
    "superposed": _superposition(
        _SUPERPOSED, replace(_SUPERPOSED, methods=("granet", "sup-granet"), dynamics=_GRANET)
    ),
    "distilled-resnet20": Study(
        "The same for KD tickets of a ResNet.",
        {"resnet20": _RESNET},
        _pairs("resnet20", *_TICKET_PAIRS),
        _FEW.format(2)
        + "1,000 images, batch 32, 30 epochs (960 steps), no augmentation, rewinding "
        "to epoch 5. The paper trains deeper networks on 50,000 augmented images for 182 epochs.",
        pool=2,
    ),
    "superposed-resnet20": _superposition(
        _DEEP_SUP, None, _FEW.format(2) + _CYCLES + "GraNet is left out.", pool=2
    ),
    "superposed-wrn22_2": _superposition(
        _WIDE_SUP, None, _FEW.format(2) + _CYCLES + "RigL is the only host.", pool=2
    ),
    "reproduced": Study(
        "ERK is better than uniform masks of as many weights, not of as many operations; "
        "redistribution makes up for uniform masks; RigL gains from longer training.",
        {
            "erk": _REPRODUCED,
            "uniform": _UNIFORM,
            "uniform-flops": _UNIFORM_FLOPS,
            **{
                f"erk-{n}x": replace(
                    _REPRODUCED.with_epochs(n * _REPRODUCED.training.epochs), methods=("rigl",)
                )
                for n in (2, 3)
            },
        },
        (
            *_pairs(
                "erk", "rigl less set", "set less static", "rigl less small-dense", "gmp less rigl"
            ),
            *((f"erk/{m}", f"uniform/{m}") for m in ("static", "set", "rigl")),
            *((f"erk/{m}", f"uniform-flops/{m}") for m in ("static", "rigl")),
            *_pairs("uniform", "rigl-sg less rigl", "rigl-sm less rigl"),
            *(("uniform/rigl-sg", "erk/rigl"), ("uniform/rigl-sm", "erk/rigl")),
            *(("erk-2x/rigl", "erk/rigl"), ("erk-3x/rigl", "erk/rigl")),
        ),
        _FEW.format(4) + "2,000 images, batch 32, 15 epochs (945 steps), updates every 20 steps to "
        "three quarters. The study trains WRN-22-2 on CIFAR-10 for 250 epochs (87,891 steps).",
        pool=4,
    ),
}
