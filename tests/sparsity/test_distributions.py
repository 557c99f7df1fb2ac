"""Uniform, ER and ERK against the golden values of the RigL code, and exact totals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsekd import models
from sparsekd.errors import UnsupportedError
from sparsekd.sparsity import DISTRIBUTIONS, allocate, erdos_renyi

LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


@pytest.fixture(scope="module")
def resnet50():
    return weight_shapes(models.resnet50(1000, stem="imagenet"))


@pytest.fixture(scope="module")
def wrn22_2():
    return weight_shapes(models.wrn22_2(10))


def total(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("sparsity", "epsilon"), [(0.8, 99.56), (0.9, 48.79), (0.95, 24.37), (0.965, 17.06)]
)
def test_epsilon_of_resnet50(resnet50, sparsity, epsilon):
    assert total(resnet50) == 25_502_912
    assert erdos_renyi(resnet50, sparsity).epsilon == pytest.approx(epsilon, abs=0.005)


def test_dense_set_of_resnet50(resnet50):
    at_80 = {f"layer1.{i}.conv{j}" for i in range(3) for j in (1, 3)}
    at_80 |= {"layer1.0.downsample.0", "layer2.0.conv1"}
    assert erdos_renyi(resnet50, 0.8).dense == at_80
    assert erdos_renyi(resnet50, 0.9).dense == {"layer1.0.conv1"}
    assert erdos_renyi(resnet50, 0.95).dense == set()


@pytest.mark.parametrize(("sparsity", "epsilon"), [(0.8, 75.61), (0.9, 35.94), (0.95, 17.35)])
def test_epsilon_of_wrn22_2(wrn22_2, sparsity, epsilon):
    # The reference rounds every layer before it solves; in reals epsilon comes out 1e-4 lower.
    assert total(wrn22_2) == 1_076_912
    assert erdos_renyi(wrn22_2, sparsity).epsilon == pytest.approx(epsilon, rel=3e-4)


def test_lenet_300_100():
    found = erdos_renyi(LENET, 0.9)
    assert found.dense == {"fc3"}
    assert found.densities == pytest.approx({"fc1": 0.0796, "fc2": 0.2302, "fc3": 1}, abs=5e-5)
    assert allocate(LENET, 0.9) == {"fc1": 18714, "fc2": 6906, "fc3": 1000}


shapes_of_layers = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 64), st.integers(1, 64)),
        st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=10,
).map(lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)})


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@given(shapes=shapes_of_layers, sparsity=st.floats(0, 1))
@settings(deadline=None)
def test_total_is_exact(distribution, shapes, sparsity):
    counts = allocate(shapes, sparsity, distribution)
    assert sum(counts.values()) == round((1 - sparsity) * total(shapes))
    assert all(0 <= counts[name] <= math.prod(shapes[name]) for name in shapes)
    assert list(counts) == list(shapes)


@given(shapes=shapes_of_layers, sparsity=st.floats(0, 1))
@settings(deadline=None)
def test_densities_add_up_and_stay_below_one(shapes, sparsity):
    found = erdos_renyi(shapes, sparsity)
    wanted = (1 - sparsity) * total(shapes)
    used = sum(found.densities[name] * math.prod(shape) for name, shape in shapes.items())
    assert used == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert all(-1e-12 <= density <= 1 + 1e-12 for density in found.densities.values())


def test_er_and_erk_agree_on_linear_layers_only(wrn22_2):
    assert allocate(LENET, 0.9, "er") == allocate(LENET, 0.9, "erk")
    assert allocate(wrn22_2, 0.9, "er") != allocate(wrn22_2, 0.9, "erk")


def test_er_ignores_the_kernel():
    shapes = {"a": (32, 16, 3, 3), "b": (32, 16, 1, 1), "c": (64, 64, 3, 3)}
    densities = erdos_renyi(shapes, 0.95, kernel=False).densities
    assert densities["a"] == densities["b"]
    assert erdos_renyi(shapes, 0.95).densities["a"] < erdos_renyi(shapes, 0.95).densities["b"]


def test_uniform_gives_every_layer_the_same_density(resnet50):
    for name, count in allocate(resnet50, 0.9, "uniform").items():
        assert abs(count - 0.1 * math.prod(resnet50[name])) <= 1


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_ends_of_the_range(distribution):
    assert sum(allocate(LENET, 1.0, distribution).values()) == 0
    assert allocate(LENET, 0.0, distribution) == {n: math.prod(s) for n, s in LENET.items()}


def test_a_layer_without_weights_gets_none():
    assert allocate({"empty": (4, 0), "fc": (10, 10)}, 0.5) == {"empty": 0, "fc": 50}


def test_an_unknown_distribution_is_refused_with_the_known_ones():
    with pytest.raises(UnsupportedError, match=r"uniform, er, erk, got 'ERK'"):
        allocate(LENET, 0.9, "ERK")


def test_a_sparsity_out_of_range_is_refused():
    for distribution in DISTRIBUTIONS:
        with pytest.raises(ValueError, match="sparsity"):
            allocate(LENET, 90, distribution)
