"""Counts are integers with an exact total."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.sparsity import apportion, check_sparsity, target_nnz


@given(
    sizes=st.lists(st.integers(0, 10_000), min_size=1, max_size=12),
    density=st.floats(0, 1),
)
@settings(deadline=None)
def test_apportion_is_exact_and_stays_within_one_of_the_quota(sizes, density):
    capacities = {str(i): size for i, size in enumerate(sizes)}
    quotas = {name: density * size for name, size in capacities.items()}
    total = target_nnz(sum(sizes), 1 - density)
    counts = apportion(quotas, capacities, total)
    assert sum(counts.values()) == total
    assert list(counts) == list(capacities)
    for name, count in counts.items():
        assert 0 <= count <= capacities[name]
        assert math.floor(quotas[name]) - 1 <= count <= math.ceil(quotas[name]) + 1


def test_the_largest_remainder_gets_the_missing_weight():
    counts = apportion({"a": 1.4, "b": 2.6, "c": 1.0}, {"a": 9, "b": 9, "c": 9}, 5)
    assert counts == {"a": 1, "b": 3, "c": 1}


def test_equal_remainders_go_to_the_earlier_layer():
    assert apportion({"a": 0.5, "b": 0.5}, {"a": 1, "b": 1}, 1) == {"a": 1, "b": 0}


def test_a_full_layer_gets_no_more_than_it_has():
    counts = apportion({"a": 2.9, "b": 1.1}, {"a": 2, "b": 9}, 4)
    assert counts == {"a": 2, "b": 2}


def test_a_total_beyond_the_capacity_is_refused():
    with pytest.raises(ValueError, match="total: expected 0 to 3, got 4"):
        apportion({"a": 1.0}, {"a": 3}, 4)


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan"), float("inf")])
def test_what_is_no_fraction_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity: expected a number in"):
        check_sparsity(sparsity)


@pytest.mark.parametrize(
    ("numel", "sparsity", "nnz"), [(1000, 0.95, 50), (7, 0.0, 7), (7, 1.0, 0), (0, 0.5, 0)]
)
def test_target(numel, sparsity, nnz):
    assert target_nnz(numel, sparsity) == nnz
