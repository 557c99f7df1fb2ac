"""Masks have an exact number of ones, and depend on nothing but their arguments."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.errors import ShapeError
from sparsekd.sparsity import (
    fan_in_masks,
    generator_for,
    global_masks,
    magnitude_mask,
    magnitude_masks,
    random_mask,
    random_masks,
    topk_indices,
)


@given(
    score=st.lists(st.integers(-3, 3), min_size=0, max_size=40),
    data=st.data(),
)
@settings(deadline=None)
def test_topk_equals_a_stable_sort(score, data):
    k = data.draw(st.integers(0, len(score)))
    wanted = sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:k])
    assert topk_indices(torch.tensor(score, dtype=torch.float32), k).tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_topk_of_every_dtype_and_layout(dtype):
    score = torch.arange(12, dtype=dtype).reshape(3, 4).t()  # not contiguous
    assert topk_indices(score, 2).tolist() == [8, 11]


def test_topk_keeps_infinities_and_refuses_nan():
    assert topk_indices(torch.tensor([1.0, float("inf"), -float("inf")]), 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="NaN"):
        topk_indices(torch.tensor([1.0, float("nan")]), 1)


@pytest.mark.parametrize("k", [-1, 4])
def test_topk_of_too_many_is_refused(k):
    with pytest.raises(ValueError, match="k: expected 0 to 3"):
        topk_indices(torch.zeros(3), k)


@pytest.mark.parametrize("nnz", [0, 1, 17, 120])
def test_random_mask_is_exact(nnz):
    mask = random_mask((4, 5, 3, 2), nnz)
    assert mask.shape == (4, 5, 3, 2)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == nnz


def test_random_mask_is_fair():
    generator = generator_for(0)
    hits = sum(random_mask((4, 5), 5, generator=generator).int() for _ in range(4000))
    # Each position is hit 1000 times on average, with a standard deviation of 27.
    assert (hits - 1000).abs().max() < 5 * 27.4


def test_random_mask_of_too_many_is_refused():
    with pytest.raises(ValueError, match="nnz: expected 0 to 6, got 7"):
        random_mask((2, 3), 7)


def test_masks_depend_on_seed_and_name_only():
    shapes = {"a": (20, 20), "b": (20, 20)}
    nnz = {"a": 100, "b": 100}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random_masks(shapes, nnz, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    alone = random_masks({"b": (20, 20)}, {"b": 100}, seed=3)
    assert torch.equal(first["b"], alone["b"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], random_masks(shapes, nnz, seed=4)["a"])


def test_masks_are_the_same_in_every_process():
    code = (
        "from sparsekd.sparsity import generator_for, random_mask;"
        "print(random_mask((40, 4), 20, generator=generator_for(7, 'conv1')).nonzero().tolist())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    here = random_mask((40, 4), 20, generator=generator_for(7, "conv1")).nonzero().tolist()
    assert elsewhere == f"{here}\n"


def test_masks_ignore_the_default_device():
    plain = random_mask((4, 4), 5)
    with torch.device("meta"):
        assert torch.equal(random_mask((4, 4), 5), plain)


def test_magnitude_mask_counts_signs_and_ties_rightly():
    weight = torch.tensor([[1.0, -2.0, 1.0], [0.0, 1.0, -1.0]])
    assert magnitude_mask(weight, 3).tolist() == [[True, True, True], [False, False, False]]
    assert magnitude_mask(weight, 5).tolist() == [[True] * 3, [False, True, True]]
    assert int(magnitude_mask(torch.zeros(7, 7), 11).sum()) == 11


def test_magnitude_mask_of_a_strided_weight_is_row_major():
    weight = torch.ones(4, 6).t()
    assert magnitude_mask(weight, 5).flatten().nonzero().flatten().tolist() == list(range(5))


def test_magnitude_masks_count_per_layer():
    weights = {"a": torch.randn(10, 10), "b": 100 * torch.randn(10, 10)}
    masks = magnitude_masks(weights, {"a": 30, "b": 2})
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 30, "b": 2}


def test_global_masks_rank_all_layers_together():
    scores = {"a": torch.tensor([[1.0, 5.0], [3.0, 3.0]]), "b": torch.tensor([3.0, 4.0])}
    masks = global_masks(scores, 4)
    assert masks["a"].tolist() == [[False, True], [True, True]]
    assert masks["b"].tolist() == [False, True]


def test_global_masks_are_exact_on_ties():
    masks = global_masks({"a": torch.zeros(5), "b": torch.zeros(3, 3)}, 7)
    assert masks["a"].all()
    assert masks["b"].flatten().nonzero().flatten().tolist() == [0, 1]


def test_global_masks_of_nothing_are_refused():
    with pytest.raises(ShapeError, match="at least one layer"):
        global_masks({}, 0)


@given(st.integers(1, 7), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_fan_in_masks_give_every_row_the_same(rows, cols, density, seed):
    nnz = round(density * rows * cols)
    mask = fan_in_masks({"fc": (rows, cols)}, {"fc": nnz}, seed=seed)["fc"]
    assert len(mask.sum(1).unique()) == 1
    assert abs(int(mask.sum()) - nnz) < rows
    assert bool(mask.any()) == bool(nnz)
    again = fan_in_masks({"other": (3, 3), "fc": (rows, cols)}, {"other": 3, "fc": nnz}, seed=seed)
    assert torch.equal(again["fc"], mask)
