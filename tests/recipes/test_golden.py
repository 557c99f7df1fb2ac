"""What every recipe that ships trains: layers masked, weights stored, updates, learning rates."""

from __future__ import annotations

import pytest
import torch

from sparsekd.data import Dataset
from sparsekd.data.dataset import Split
from sparsekd.dst import METHODS
from sparsekd.nn import sparse_modules
from sparsekd.recipes import RECIPES, Experiment, RunFolder, TrainingRun, build_model, get
from sparsekd.tickets import SupTickets
from sparsekd.train import save_model

SETS = {
    "digits": (10, (1, 8, 8), 1437),
    "text": (96, (1, 1, 32), 10_000),
    "fashion-mnist": (10, (1, 28, 28), 60_000),
    "cifar10": (10, (3, 32, 32), 50_000),
    "cifar100": (100, (3, 32, 32), 50_000),
    "imagefolder": (1000, (3, 224, 224), 1_281_167),
}

# Weights of the convolutions, and with those of the linear layers.
RESNET20 = (269_968, 270_608)
RESNET56 = 579_760
RESNET50 = (23_454_912, 25_502_912)
RESNET50_CIFAR = 23_652_032
WRN = 1_076_480  # without the first convolution
DEMO = 1_075_200  # the same for one channel; without shortcuts' and the last layer's
VGG19 = 20_070_080
VIT = 12 * 12 * 192**2  # blocks, in each 3 + 1 + 4 + 4 matrices of that size
GPT = 6 * 12 * 192**2

_SLOW = pytest.mark.slow


def images(choice):
    """Return a data set of the size that a recipe trains on, all images the same one."""
    classes, shape, count = SETS[choice.name]
    count = choice.train_images or round(count * (1 - choice.val_fraction))

    def split(size):
        blank = torch.zeros(1, *shape, dtype=torch.uint8).expand(size, *shape)
        labels = torch.zeros(1, dtype=torch.int64).expand(size)
        return Split(blank, labels, torch.zeros(shape[0]), torch.ones(shape[0]), lambda x, _: x)

    return Dataset(choice.name, classes, shape, split(count), split(0), split(1))


@pytest.fixture
def trainer(tmp_path):
    """Return a function that builds the trainer of a run as `sparsekd train` does."""

    def build(recipe, method, sparsity):
        data = images(recipe.data)
        experiment = Experiment(recipe, data, RunFolder(tmp_path, recipe))
        if METHODS[method].needs_dense:
            for epoch in {0, recipe.rewind_epoch, recipe.training.epochs}:
                path = tmp_path / f"seed0/dense/epoch_{epoch:03}.safetensors"
                save_model(path, build_model(recipe.model, data, epoch))
        return experiment.trainer(TrainingRun(0, method, sparsity))

    return build


def stored(model):
    """Return how many weights the masked layers store, and how many they have."""
    topologies = [module.topology for _, module in sparse_modules(model)]
    return sum(t.nnz for t in topologies), sum(t.numel for t in topologies)


def updates(trainer):
    dst = trainer.dst.dst if isinstance(trainer.dst, SupTickets) else trainer.dst
    steps = len(trainer.data.batches(trainer.config.batch_size))
    return 0 if dst is None else dst.updates_ahead(trainer.config.epochs * steps)


@pytest.mark.parametrize(
    "name, method, sparsity, nnz, numel, number",
    [
        ("demo", "kd", 0.9, 107_520, DEMO, 0),
        ("demo", "rigl", 0.98, 21_504, DEMO, 6),
        ("vit", "kd", 0.9, 530_842, VIT, 0),
        ("vit", "rigl", 0.9, 530_842, VIT, 13),
        ("char_gpt", "kd", 0.9, 265_421, GPT, 0),
        ("char_gpt", "rigl", 0.9, 265_421, GPT, 9),
        ("fashion-mnist", "kd", 0.98, 5_400, RESNET20[0], 0),
        ("kd_ticket_cifar10", "kd", 0.9719, 16_292, RESNET56, 0),
        ("kd_ticket_cifar10", "kd-rewind", 0.9719, 16_292, RESNET56, 0),
        pytest.param("kd_ticket_imagenet", "kd", 0.8926, 2_519_058, RESNET50[0], 0, marks=_SLOW),
        ("rigl_cifar10", "rigl", 0.9, 107_648, WRN, 750),
        ("rigl_cifar10", "gmp", 0.9, WRN, WRN, 550),
        pytest.param("rigl_imagenet", "rigl", 0.9, 2_550_291, RESNET50[1], 249, marks=_SLOW),
        pytest.param("rigl_imagenet", "set", 0.8, 5_100_582, RESNET50[1], 249, marks=_SLOW),
        pytest.param("granet_cifar100", "granet", 0.98, 10_035_040, VGG19, 79, marks=_SLOW),
        pytest.param("granet_cifar100", "rigl", 0.98, 401_402, VGG19, 79, marks=_SLOW),
        ("compare", "kd", 0.95, 13_499, RESNET20[0], 0),
        ("compare", "rigl", 0.95, 13_530, RESNET20[1], 47),
        ("compare", "granet", 0.95, 135_304, RESNET20[1], 62),
        ("compare", "gmp", 0.95, RESNET20[1], RESNET20[1], 36),
    ],
)
def test_weights_and_updates(trainer, name, method, sparsity, nnz, numel, number):
    built = trainer(get(name), method, sparsity)
    assert (*stored(built.model), updates(built)) == (nnz, numel, number)


@pytest.mark.parametrize(
    "name, method, sparsity, nnz, numel, number, lr",
    [
        pytest.param(
            *("sup_tickets_cifar100", "sup-rigl", 0.95),
            *(1_182_602, RESNET50_CIFAR, 88 + 3, (0.001, 0.005)),
            marks=_SLOW,
        ),
        pytest.param(
            *("sup_tickets_cifar100", "sup-granet", 0.95),
            *(11_826_016, RESNET50_CIFAR, 88 + 3, (0.001, 0.005)),
            marks=_SLOW,
        ),
        pytest.param(
            *("sup_tickets_imagenet", "sup-rigl", 0.9),
            *(2_550_291, RESNET50[1], 230 + 4, (1e-4, 5e-4)),
            marks=_SLOW,
        ),
        ("compare", "sup-rigl", 0.95, 13_530, RESNET20[1], 51 + 3, (0.001, 0.005)),
    ],
)
def test_weights_updates_and_cycles(
    trainer, name, method, sparsity, nnz, numel, number, lr, recwarn
):
    built = trainer(get(name), method, sparsity)
    assert (*stored(built.model), updates(built)) == (nnz, numel, number)
    assert built.dst.cycles.lr == pytest.approx(lr)
    assert not [warning for warning in recwarn if "Sup-tickets" in str(warning.message)]


@pytest.mark.parametrize(
    "name, rates",
    [
        ("demo", {0.5: 0.05, 1: 0.1, 4: 0.01, 6: 0.001}),
        ("vit", {1: 0.005, 2: 0.01, 11: 0.005, 20: 0}),
        ("char_gpt", {0.5: 0.025, 1: 0.05, 2.5: 0.025, 4: 0}),
        ("fashion-mnist", {0.5: 0.05, 1: 0.1, 10: 0}),
        ("kd_ticket_cifar10", {0: 0.1, 89: 0.1, 90: 0.01, 135: 0.001, 181: 0.001}),
        ("kd_ticket_imagenet", {2.5: 0.2, 5: 0.4, 30: 0.04, 60: 0.004, 80: 0.0004}),
        ("sup_tickets_cifar100", {0: 0.1, 125: 0.01, 187: 0.001}),
        ("sup_tickets_imagenet", {2.5: 0.05, 5: 0.1, 33: 0.01, 65: 0.001, 92: 0.0001}),
        ("rigl_cifar10", {0: 0.1, 77: 0.02, 153: 0.004, 230: 0.0008}),
        ("rigl_imagenet", {2.5: 0.8, 5: 1.6, 30: 0.16, 70: 0.016, 90: 0.0016}),
        ("granet_cifar100", {0: 0.1, 80: 0.01, 120: 0.001}),
        ("compare", {0.5: 0.05, 1: 0.1, 8: 0.01, 12: 0.001}),
    ],
)
def test_learning_rates(name, rates):
    training = get(name).training
    assert {epoch: training.learning_rate(epoch) for epoch in rates} == pytest.approx(rates)


@pytest.mark.parametrize(
    "name, batch_size, images, nesterov, decay, all_decay",
    [
        ("kd_ticket_cifar10", 128, 45_000, False, 2e-4, True),
        ("kd_ticket_imagenet", 512, 1_281_167, False, 1e-4, True),
        ("sup_tickets_cifar100", 128, 50_000, False, 5e-4, True),
        ("sup_tickets_imagenet", 128, 1_281_167, False, 1e-4, True),
        ("rigl_cifar10", 128, 50_000, True, 5e-4, False),
        ("rigl_imagenet", 4096, 1_281_167, True, 1e-4, False),
        ("granet_cifar100", 100, 50_000, True, 5e-4, True),
    ],
)
def test_published_optimizers_and_batches(name, batch_size, images, nesterov, decay, all_decay):
    recipe = get(name)
    training, count = recipe.training, SETS[recipe.data.name][2]
    assert (training.batch_size, round(count * (1 - recipe.data.val_fraction))) == (
        batch_size,
        images,
    )
    assert (training.momentum, training.nesterov) == (0.9, nesterov)
    assert (training.weight_decay, training.decay_norm_and_bias) == (decay, all_decay)


# The recipe of each method alone, at 95 %: weights stored at the start, those of the masked layers,
# updates in 4,690 steps, or in the 3,283 before three cycles.
_TICKET, _RANDOM, _HALF = (13_499, RESNET20[0]), (13_530, RESNET20[1]), (135_304, RESNET20[1])
_FULL = (RESNET20[1], RESNET20[1])
ALONE = {
    **dict.fromkeys(("lt", "reinit", "kd", "rewind", "lr-rewind", "kd-rewind"), (*_TICKET, 0)),
    "imp": (13_531, RESNET20[1], 0),  # what is pruned rounds down
    **dict.fromkeys(("static", "snip", "grasp", "synflow"), (*_RANDOM, 0)),
    "small-dense": (0, 0, 0),
    **dict.fromkeys(("set", "snfs", "rigl", "rigl-sg", "rigl-sm", "topkast"), (*_RANDOM, 35)),
    **dict.fromkeys(("itop", "mest"), (*_RANDOM, 46)),  # to the end
    "srigl": (13_522, RESNET20[1], 35),  # rows of a layer store equally many
    "granet": (*_HALF, 46),
    "gmp": (*_FULL, 27),
    "acdc": (*_FULL, 8 + 7),  # compressions and decompressions
    **dict.fromkeys(("sup-set", "sup-rigl"), (*_RANDOM, 32 + 3)),
    "sup-granet": (*_HALF, 32 + 3),
    "kd-sup-rigl": (*_TICKET, 32 + 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_weights_and_updates_of_one_method(trainer, name, recwarn):
    built = trainer(get(name), name, 0.95)
    assert (*stored(built.model), updates(built)) == ALONE[name]
    if METHODS[name].superpose:
        assert built.dst.cycles.lr == pytest.approx((0.001, 0.005))
        assert not [warning for warning in recwarn if "Sup-tickets" in str(warning.message)]


@pytest.mark.parametrize("name", METHODS)
def test_learning_rates_of_one_method(name):
    # Before cycles the schedule is squeezed, and ends above 0.
    steps = {0.5: 0.05, 1: 0.1, 5: 0.01, 8: 0.001}
    rates = steps if METHODS[name].superpose else {0.5: 0.05, 1: 0.1, 10: 0}
    training = get(name).training
    assert {epoch: training.learning_rate(epoch) for epoch in rates} == pytest.approx(rates)


def test_every_recipe_has_golden_rows():
    def named(test):
        rows = next(m for m in test.pytestmark if m.name == "parametrize").args[1]
        return {getattr(row, "values", row)[0] for row in rows}

    others = RECIPES.keys() - METHODS.keys()
    weights = named(test_weights_and_updates) | named(test_weights_updates_and_cycles)
    assert weights == named(test_learning_rates) == others
    assert ALONE.keys() == METHODS.keys()
