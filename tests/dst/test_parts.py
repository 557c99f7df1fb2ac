"""Schedules, drop scores and grow rules on their own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd import Topology
from sparsekd.dst import dynamics, growers, scores


def test_the_cosine_starts_at_the_fraction_falls_and_ends_at_zero():
    schedule = dynamics.cosine(0.3, every=1, until=100)
    fractions = [schedule.fraction(t) for t in range(101)]
    assert fractions[0] == 0.3
    assert fractions[100] == 0
    assert all(a > b for a, b in itertools.pairwise(fractions))
    assert fractions[40] == pytest.approx(0.3 / 2 * (1 + math.cos(math.pi * 40 / 100)), rel=1e-14)


def test_updates_come_every_so_often_and_stop_before_until():
    schedule = dynamics.cosine(0.3, every=10, until=40)
    assert [t for t in range(1, 100) if schedule(t) is not None] == [10, 20, 30]


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"drop_fraction": -0.1}, "drop_fraction"),
        ({"drop_fraction": 1.1}, "drop_fraction"),
        ({"drop_fraction": math.nan}, "drop_fraction"),
        ({"every": 0}, "every"),
        ({"every": 2.5}, "every"),
        ({"until": 0}, "until"),
    ],
)
def test_schedules_refuse_arguments_out_of_range(wrong, named):
    with pytest.raises(ValueError, match=f"{named}: expected .* got"):
        dynamics.cosine(**({"drop_fraction": 0.3, "every": 10, "until": 40} | wrong))


@given(st.lists(st.integers(0, 4), max_size=40), st.data())
def test_drop_takes_exactly_the_smallest_with_ties_to_the_lower_slot(magnitudes, data):
    k = data.draw(st.integers(0, len(magnitudes)))
    naive = sorted(range(len(magnitudes)), key=lambda slot: (magnitudes[slot], slot))[:k]
    slots = scores.smallest(torch.tensor(magnitudes, dtype=torch.float32), k)
    assert slots.tolist() == sorted(naive)


@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_without_removes_just_these_slots(rows, cols, data):
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols))
    )
    topology = Topology.from_mask(mask.view(rows, cols))
    gone = data.draw(st.sets(st.integers(0, max(topology.nnz - 1, 0)), max_size=topology.nnz))
    kept = scores.without(topology, torch.tensor(sorted(gone), dtype=torch.int64))
    positions = topology.flat_indices().tolist()
    expected = [p for slot, p in enumerate(positions) if slot not in gone]
    assert kept.flat_indices().tolist() == expected


@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_random_growth_is_exact_and_never_selects_what_is_kept(rows, cols, data):
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols))
    )
    kept = Topology.from_mask(mask.view(rows, cols))
    free = kept.numel - kept.nnz
    k = data.draw(st.integers(0, free + 3))
    grown = growers.random(kept, k, torch.Generator().manual_seed(0))
    assert len(grown) == min(k, free)
    assert grown.tolist() == sorted(set(grown.tolist()))
    assert not mask[grown].any()


def test_random_growth_is_uniform():
    """Each of the C(6, 2) pairs of free positions comes up equally often."""
    kept = Topology.from_mask(torch.tensor([[True, False, False, True], [False] * 4]))
    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    draws = 6000
    for _ in range(draws):
        pair = tuple(growers.random(kept, 2, generator).tolist())
        counts[pair] = counts.get(pair, 0) + 1
    expected = draws / math.comb(6, 2)
    chi_squared = sum((n - expected) ** 2 / expected for n in counts.values())
    assert len(counts) == 15
    assert chi_squared < 36.1  # the 0.1 % quantile of 14 degrees of freedom


@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_growth_by_score_takes_the_largest_outside_with_ties_to_the_lower_position(
    rows, cols, data
):
    numel = rows * cols
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=numel, max_size=numel)))
    score = data.draw(st.lists(st.integers(0, 3), min_size=numel, max_size=numel))
    kept = Topology.from_mask(mask.view(rows, cols))
    free = [p for p in range(numel) if not mask[p]]
    k = data.draw(st.integers(0, len(free) + 3))
    naive = sorted(free, key=lambda p: (-score[p], p))[:k]
    grown = growers.largest(torch.tensor(score, dtype=torch.float32).view(rows, cols), kept, k)
    assert grown.tolist() == sorted(naive)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 10**6))
def test_growth_in_cells_takes_the_best_of_each_whatever_the_rectangles(data, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, cols = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    score = torch.randint(-3, 4, (rows, cols), generator=generator).double()  # with ties
    kept = Topology.from_mask(torch.rand(rows, cols, generator=generator) < 0.3)
    cell = torch.randint(0, 4, (rows * cols,), generator=generator)
    quota = torch.randint(0, 5, (4,), generator=generator)
    high, wide = data.draw(st.integers(1, rows)), data.draw(st.integers(1, cols))
    blocks = [
        (r, c, score[r : r + high, c : c + wide])
        for r in range(0, rows, high)
        for c in range(0, cols, wide)
    ]
    taken, flat = kept.mask().view(-1), score.abs().view(-1)
    expected = []
    for name, most in enumerate(quota.tolist()):
        free = [p for p in range(rows * cols) if cell[p] == name and not taken[p]]
        expected += sorted(free, key=lambda p: (-float(flat[p]), p))[:most]
    for order in (blocks, blocks[::-1]):
        found = growers.largest_in_cells(order, kept, lambda at: cell[at], quota)
        assert found.tolist() == sorted(expected)
