"""What the recipes that ship say, and the runs they plan."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from sparsekd.dst import METHODS
from sparsekd.errors import DataError
from sparsekd.recipes import (
    RECIPES,
    DataChoice,
    ModelChoice,
    build_model,
    get,
    load_data,
    override,
    plan,
)
from sparsekd.train import state_hash


def test_the_published_cifar_recipe():
    recipe = get("kd_ticket_cifar10")
    training, kd = recipe.training, recipe.kd
    assert (recipe.model.name, recipe.model.bottleneck) == ("resnet56", True)
    assert (recipe.data.name, recipe.data.val_fraction) == ("cifar10", 0.1)
    assert (kd.temperature, kd.alpha, kd.reduction, kd.until) == (5, 0.9, "mean", None)
    assert (training.epochs, training.batch_size, training.milestones) == (182, 128, (90, 135))
    assert (training.lr, training.gamma, training.momentum) == (0.1, 0.1, 0.9)
    assert (training.weight_decay, training.nesterov, training.warmup) == (2e-4, False, 0)
    percent = [round(100 * s, 2) for s in recipe.sparsities]
    assert percent[:6] == [20, 36, 48.8, 59.04, 67.23, 73.79]
    assert percent[-4:] == [94.5, 95.6, 96.48, 97.19]
    assert recipe.rewind_epoch == 33


def test_the_published_imagenet_recipe():
    recipe = get("kd_ticket_imagenet")
    training, kd = recipe.training, recipe.kd
    assert (recipe.model.name, recipe.model.stem) == ("resnet50", "imagenet")
    assert (kd.temperature, kd.alpha, kd.reduction, kd.until) == (4, 0.9, "batchmean", 60)
    assert (training.epochs, training.batch_size, training.lr) == (90, 512, 0.4)
    assert (training.warmup, training.milestones) == (5, (30, 60, 80))
    assert (training.weight_decay, training.momentum) == (1e-4, 0.9)
    assert [round(100 * s, 2) for s in recipe.sparsities] == [36, 59.04, 73.79, 83.22, 89.26]
    assert (recipe.data.scale, recipe.data.ratio) == ((0.1, 1.0), (0.8, 1.25))


@pytest.mark.parametrize(
    "name, tail, milestones, warmup, lr",
    [
        ("sup_tickets_cifar100", 24, (113, 169), 0, (0.001, 0.005)),
        ("sup_tickets_imagenet", 8, (30, 60, 85), 5, (1e-4, 5e-4)),
    ],
)
def test_the_published_recipes_of_sup_tickets(name, tail, milestones, warmup, lr):
    recipe = get(name)
    assert recipe.sup.tail(recipe.training.epochs) == tail
    squeezed = recipe.training.squeezed(tail)
    assert (squeezed.milestones, squeezed.warmup) == (milestones, warmup)
    assert squeezed.learning_rate(recipe.training.epochs - tail - 1) == pytest.approx(lr[0])
    assert recipe.sup.with_host(lr[0], 0.1).lr == pytest.approx(lr)
    assert (recipe.sup.drop_fraction, recipe.sup.prune_each) == (0.5, True)
    assert (recipe.dynamics.distribution, recipe.dynamics.decay) == ("erk", "constant")
    assert {"rigl", "sup-rigl"} <= set(recipe.methods)


def test_a_method_on_its_own_trains_the_dense_network_only_where_it_needs_it():
    assert [run.name for run in plan(get("sup-rigl"))] == [
        "seed0/sup-rigl-0.95",
        "seed0/sup-rigl-0.98",
    ]
    assert "seed0/dense" in {run.name for run in plan(get("kd-sup-rigl"))}
    recipe = get("sup-rigl")
    assert recipe.sup.tail(recipe.training.epochs) == 3
    assert recipe.data == get("fashion-mnist").data


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_recipe_of_its_own(name):
    recipe = get(name)
    assert recipe.methods == (name,)
    assert any(run.method == "dense" for run in plan(recipe)) == METHODS[name].needs_dense


@pytest.mark.parametrize(
    "name, until, milestones",
    [("rigl_cifar10", 75_000 / 97_656, (77, 153, 230)), ("rigl_imagenet", 25 / 32, (30, 70, 90))],
)
def test_the_published_recipes_of_rigl(name, until, milestones):
    recipe = get(name)
    assert (recipe.dynamics.drop_fraction, recipe.dynamics.every) == (0.3, 100)
    assert (recipe.dynamics.until, recipe.training.milestones) == (until, milestones)


def test_the_published_recipe_of_granet():
    recipe = get("granet_cifar100")
    assert recipe.dynamics.prune_until * recipe.training.epochs == 110
    assert (recipe.dynamics.every, recipe.dynamics.drop_fraction) == (1000, 0.5)


def test_a_layout_is_a_field_of_every_recipe():
    recipe = override(get("rigl"), "layout=bcsr")
    assert recipe.layout == "bcsr:16"
    recipe.check_layout()
    with pytest.raises(ValueError, match="layout: expected one of csr, bcsr, fanin, nm"):
        override(recipe, "layout=blocks")
    nm = override(recipe, "layout=nm")
    with pytest.raises(ValueError, match="sparsity: layout 'nm:2:4' keeps 2 of 4 weights"):
        nm.check_layout()
    override(nm, "sparsities=0.5").check_layout()


def test_methods_by_their_long_names_and_dense():
    recipe = replace(get("compare"), methods=("kd-ticket", "dense", "kd"), sparsities=(0.9,))
    assert recipe.methods == ("kd", "dense")
    assert [run.name for run in plan(replace(recipe, seeds=1))] == ["seed0/dense", "seed0/kd-0.9"]
    assert [run.name for run in plan(replace(recipe, methods=("dense",), seeds=1))] == [
        "seed0/dense"
    ]
    with pytest.raises(ValueError, match="did you mean rigl"):
        replace(recipe, methods=("rgl",))


def test_a_comparison_reads_fewer_images_the_same_for_every_seed():
    choice = DataChoice("digits", train_images=100)
    first, second = (load_data(choice, None).train for _ in range(2))
    assert len(first) == 100
    assert torch.equal(first.images, second.images)
    with pytest.raises(DataError, match="train_images: expected at most"):
        load_data(DataChoice("digits", train_images=100_000), None)
    with pytest.raises(ValueError, match="train_images"):
        DataChoice("digits", train_images=0)


def test_the_demo_compares_five_methods_at_three_sparsities_over_seeds():
    runs = plan(get("demo"))
    assert {run.sparsity for run in runs if run.method != "dense"} == {0.9, 0.95, 0.98}
    assert {run.method for run in runs} == {"dense", "lt", "reinit", "kd", "rigl", "sup-rigl"}
    assert {run.seed for run in runs} == {0, 1, 2}


def test_fashion_mnist_pairs_lt_and_kd_on_one_teacher_a_seed():
    recipe = get("fashion-mnist")
    assert recipe == get("fashion_mnist")
    runs = plan(recipe)
    assert [run.name for run in runs if run.seed == 1] == [
        "seed1/dense",
        "seed1/lt-0.9",
        "seed1/kd-0.9",
        "seed1/lt-0.98",
        "seed1/kd-0.98",
    ]
    assert {run.seed for run in runs} == {0, 1, 2}


def test_an_iterative_plan_reaches_the_highest_sparsity():
    recipe = replace(get("demo"), methods=("imp",), sparsities=(0.36, 0.5904), seeds=1)
    rounds = [run for run in plan(recipe) if run.method == "imp"]
    assert [run.sparsity for run in rounds] == [0.2, 0.36, 0.488, 0.5904]
    assert rounds[-1].name == "seed0/imp-round04"


def test_presets_are_frozen():
    with pytest.raises(FrozenInstanceError):
        get("demo").seeds = 2
    with pytest.raises(ValueError, match="demo, fashion-mnist"):
        get("unknown")
    assert all(recipe.name == name for name, recipe in RECIPES.items())


def test_epochs_scale_the_whole_schedule():
    recipe = get("kd_ticket_imagenet").with_epochs(18)
    assert recipe.training.milestones == (6, 12, 16)
    assert (recipe.training.warmup, recipe.kd.until, recipe.rewind_epoch) == (1, 12, 1)


def test_a_shorter_run_updates_as_often_and_a_longer_one_more():
    recipe = get("rigl_cifar10")
    assert [recipe.with_epochs(e).dynamics.every for e in (250, 125, 25, 500)] == [100, 50, 10, 100]
    assert recipe.with_epochs(25).dynamics.until == recipe.dynamics.until


def test_methods_keep_their_own_dynamics_in_a_comparison():
    recipe = get("compare")
    own = {name: recipe.dynamics_of(METHODS[name]) for name in ("rigl", "granet", "sup-granet")}
    assert {dynamics.every for dynamics in own.values()} == {40}
    shares = [(d.drop_fraction, d.decay, d.until, d.prune_until) for d in own.values()]
    assert shares == [
        (0.3, "cosine", 0.75, 0.5),
        (0.5, "cosine", 1.0, 110 / 160),
        (0.5, "constant", 1.0, 110 / 226),
    ]
    same = override(recipe, "own_dynamics=false")
    assert same.dynamics_of(METHODS["granet"]) == same.dynamics
    with pytest.raises(ValueError, match="own_dynamics: leaves only distribution, every, backward"):
        override(recipe, "dynamics.drop_fraction=0.5")


def test_cycles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cycle_count: 20 cycles of 1 do not fit into 16"):
        override(get("compare"), "sup.cycle_count=20")


def test_networks_follow_the_data_and_the_seed(digits):
    a, b = (build_model(ModelChoice("resnet20"), digits, seed) for seed in (0, 0))
    other = build_model(ModelChoice("resnet20"), digits, 1)
    assert a.conv1.in_channels == 1
    assert a.fc.out_features == 10
    assert (
        state_hash(a.state_dict()) == state_hash(b.state_dict()) != state_hash(other.state_dict())
    )


def test_a_choice_the_network_does_not_have_raises(digits):
    with pytest.raises(ValueError, match="lenet5 does not fit"):
        build_model(ModelChoice("lenet5", stem="cifar"), digits, 0)
