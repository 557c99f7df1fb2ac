"""Schedules meet their end points and move one way in between."""

from __future__ import annotations

import math

import pytest

from sparsekd.sparsity import Constant, Cosine, Polynomial


def test_constant():
    assert {Constant(0.3)(step) for step in (0, 5, 10**6)} == {0.3}


def test_cosine_follows_the_formula():
    schedule = Cosine(0.3, until=75)
    for step in range(75):
        assert schedule(step) == pytest.approx(0.15 * (1 + math.cos(math.pi * step / 75)))
    values = [schedule(step) for step in range(100)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.3
    assert set(values[75:]) == {0.0}


def test_cosine_with_a_floor():
    schedule = Cosine(0.5, until=10, final=0.1)
    assert schedule(5) == pytest.approx(0.3)
    assert schedule(10) == schedule(11) == 0.1


def test_cubic_follows_the_formula():
    schedule = Polynomial(0.0, 0.9, begin=100, end=500)
    for step in range(100, 501):
        wanted = 0.9 - 0.9 * (1 - (step - 100) / 400) ** 3
        assert schedule(step) == pytest.approx(wanted)
    assert schedule(0) == 0.0
    assert schedule(501) == 0.9


def test_linear_and_falling():
    assert Polynomial(0.9, 0.5, begin=0, end=4, power=1)(1) == pytest.approx(0.8)


@pytest.mark.parametrize(("begin", "end"), [(5, 5), (6, 5), (-1, 5)])
def test_an_empty_interval_is_refused(begin, end):
    with pytest.raises(ValueError, match="begin, end"):
        Polynomial(0.0, 1.0, begin=begin, end=end)


def test_a_cosine_without_length_is_refused():
    with pytest.raises(ValueError, match="until"):
        Cosine(0.3, until=0)
