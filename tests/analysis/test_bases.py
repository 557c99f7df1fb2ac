"""Identities of bases and tickets in float64, and conversions that compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsekd import models
from sparsekd.analysis.bases import (
    BASES,
    encode,
    factorize,
    keep_coefficients,
    largest_units,
    make_bases,
    make_basis,
    make_basis_ticket,
    narrow,
    plain,
    prune_coefficients,
    rank_cost,
    rank_masks,
    sparse_layers,
    stored_numbers,
    unit_masks,
    units_within,
)
from sparsekd.analysis.bases.basis import dct_matrix, hadamard_matrix, random_matrix
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.nn import sparse_modules
from sparsekd.tickets import make_ticket, prune
from sparsekd.train import state_hash

SHAPES = [(5, 7), (8, 4), (3, 12), (6, 2, 3, 3), (4, 3, 5, 5), (4, 1, 2, 3)]


def chain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 5)),
    ).double()


def images(count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 28, 120])
@pytest.mark.parametrize("make", [dct_matrix, hadamard_matrix, lambda n: random_matrix(n, 0)])
def test_matrices_are_orthonormal(make, size):
    matrix = make(size)
    expected = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix.mT @ matrix, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_a_basis_round_trips_and_keeps_the_norm(kind, shape):
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    basis = make_basis(kind, weight, seed=3)
    coefficients = basis.encode(weight)
    torch.testing.assert_close(basis.decode(coefficients), weight, rtol=0, atol=1e-13)
    torch.testing.assert_close(coefficients.norm(), weight.norm(), rtol=1e-13, atol=0)
    other = torch.randn(shape, dtype=torch.float64)
    product = (basis.encode(other) * coefficients).sum()  # B is orthonormal, not only invertible
    torch.testing.assert_close(product, (other * weight).sum(), rtol=1e-12, atol=1e-12)


def test_the_dct_of_a_kernel_is_that_of_scipy():
    from scipy.fft import dctn

    weight = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    expected = dctn(weight.numpy(), axes=(2, 3), norm="ortho")
    ours = make_basis("dct", weight).encode(weight)
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-13)
    flat = torch.randn(12, 7, dtype=torch.float64)
    ours = make_basis("dct", flat).encode(flat)
    expected = dctn(flat.numpy(), norm="ortho")
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-13)


def test_in_its_own_svd_basis_a_weight_is_the_diagonal_of_its_singular_values():
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    c = make_basis("svd", weight).encode(weight).flatten(1)
    singular = torch.linalg.svdvals(weight.flatten(1))
    torch.testing.assert_close(c[:, :4], singular.diag(), rtol=0, atol=1e-12)
    assert c[:, 4:].abs().max() < 1e-12


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97])
def test_the_identity_basis_gives_the_ordinary_ticket_bit_for_bit(sparsity):
    trained, fresh = chain(1).float(), chain(2).float()
    bases = make_bases(trained, "identity")
    masks = prune_coefficients(encode(trained, bases), sparsity)
    ordinary = prune(trained, sparsity, layers="all", allow_collapse=True)
    assert masks.keys() == ordinary.keys()
    assert all(torch.equal(masks[name], ordinary[name]) for name in masks)
    ticket = make_basis_ticket(fresh, bases, masks)
    expected = make_ticket(fresh, ordinary)
    for name, module in sparse_modules(expected):
        parts = ticket.get_submodule(name).parametrizations.weight
        assert torch.equal(parts.original, module.values)
    converted = sparse_layers(ticket, masks)
    assert state_hash(converted.state_dict()) == state_hash(expected.state_dict())


@pytest.mark.parametrize("kind", BASES)
def test_with_every_coefficient_sgd_takes_the_steps_it_takes_on_the_weights(kind):
    dense, x = chain(), images(8)
    bases = make_bases(chain(5), kind, seed=1)
    full = {name: torch.ones_like(dense.get_submodule(name).weight) > 0 for name in bases}
    ticket = make_basis_ticket(dense, bases, full)
    y = torch.arange(8) % 5
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    runs = [(m, torch.optim.SGD(m.parameters(), **options)) for m in (dense, ticket)]
    start = dense[0].weight.detach().clone()
    for _ in range(10):
        for model, optimizer in runs:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert (dense[0].weight - start).norm() > 0.01
    for name in bases:
        ours, theirs = ticket.get_submodule(name).weight, dense.get_submodule(name).weight
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", BASES)
def test_training_moves_kept_coefficients_only(kind):
    model, x = chain(), images()
    bases = make_bases(chain(1), kind)
    masks = prune_coefficients(encode(chain(1), bases), 0.8)
    ticket = make_basis_ticket(model, bases, masks)
    optimizer = torch.optim.SGD(ticket.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        ticket(x).square().mean().backward()
        optimizer.step()
    for name, basis in bases.items():
        layer = ticket.get_submodule(name)
        c = basis.encode(layer.weight)
        assert c[~masks[name]].abs().max() < 1e-12
        assert layer.parametrizations.weight.original.numel() == int(masks[name].sum())
    total = sum(mask.numel() for mask in masks.values())
    assert stored_numbers(kind if kind != "svd" else "dct", masks) == total - int(0.8 * total)


def test_an_assigned_weight_is_projected():
    weight = torch.randn(6, 6, dtype=torch.float64)
    basis = make_basis("random", weight)
    mask = torch.rand(6, 6) < 0.5
    layer = keep_coefficients(nn.Linear(6, 6).double(), basis, mask)
    layer.weight = weight
    expected = basis.decode(basis.encode(weight) * mask)
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-13)
    assert (weight - layer.weight).norm() < weight.norm()


@pytest.mark.parametrize("kind", BASES)
def test_a_ticket_saves_loads_and_copies(kind):
    bases = make_bases(chain(), kind)
    masks = prune_coefficients(encode(chain(), bases), 0.8)
    ticket = make_basis_ticket(chain(1), bases, masks)
    # Singular vectors of another weight: those of the ticket come with its state.
    other = make_basis_ticket(chain(2), make_bases(chain(3), kind), masks)
    other.load_state_dict(ticket.state_dict())
    x = images()
    torch.testing.assert_close(other.eval()(x), ticket.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(ticket)(x), ticket(x), rtol=0, atol=0)
    torch.testing.assert_close(plain(ticket)(x), ticket(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", [(8, 20), (8, 3, 3, 3)], ids=str)
def test_a_block_of_k_by_k_is_the_best_weight_of_rank_k(rank, shape):
    weight = torch.randn(shape, dtype=torch.float64)
    basis = make_basis("svd", weight)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.flatten(1)[:rank, :rank] = True
    kept = basis.decode(basis.encode(weight) * mask)
    singular = torch.linalg.svdvals(weight.flatten(1))
    torch.testing.assert_close((weight - kept).norm(), singular[rank:].norm())
    assert torch.linalg.matrix_rank(kept.flatten(1)) == rank
    # Trained, the block is any matrix, and the rank stays at most k.
    other = basis.decode(basis.encode(torch.randn(shape, dtype=torch.float64)) * mask)
    assert torch.linalg.matrix_rank(other.flatten(1)) <= rank


def test_ranks_are_the_largest_within_the_budget():
    shapes = {"fc": (100, 300), "conv": (16, 6, 5, 5), "small": (10, 3)}
    for density in (0.01, 0.1, 0.5, 0.99):
        for name, mask in rank_masks(shapes, density).items():
            shape, rank = shapes[name], int(mask.sum()) ** 0.5
            numel = mask.numel()
            assert mask.flatten(1)[: int(rank), : int(rank)].all()
            if rank > 1:
                assert rank_cost(shape, int(rank)) <= density * numel
            if rank < min(shape[0], numel // shape[0]):
                assert rank_cost(shape, int(rank) + 1) > density * numel
    masks = rank_masks({"fc": (100, 300)}, 0.1)
    assert stored_numbers("svd", masks) == 49 + 7 * 400


def test_a_ticket_of_low_rank_becomes_two_layers_that_compute_the_same():
    model = chain(4)
    shapes = {n: tuple(model.get_submodule(n).weight.shape) for n in make_bases(model, "svd")}
    masks = rank_masks(shapes, 0.4)
    ticket = make_basis_ticket(model, make_bases(chain(1), "svd"), masks).eval()
    small = factorize(ticket)
    torch.testing.assert_close(small(images()), ticket(images()), rtol=0, atol=1e-12)
    rank = int(masks["7"].sum()) ** 0.5
    assert [tuple(p.shape) for p in small[7].parameters()] == [(rank, 32), (12, rank), (12,)]
    assert isinstance(small[4][0], nn.Conv2d)
    assert small[4][0].stride == (2, 2)


def test_a_ticket_that_is_no_block_is_not_factorized():
    bases = make_bases(chain(), "dct")
    ticket = make_basis_ticket(chain(), bases, prune_coefficients(encode(chain(), bases), 0.5))
    with pytest.raises(UnsupportedError, match="keeps no block"):
        factorize(ticket)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_a_ticket_of_units_becomes_a_narrower_network(share):
    model = chain(4)
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].bias.normal_()
    keep = largest_units(model, share)
    masks = unit_masks(model, keep)
    ticket = make_basis_ticket(model, make_bases(model, "units"), masks).eval()
    small = narrow(ticket, keep)
    torch.testing.assert_close(small(images()), ticket(images()), rtol=0, atol=1e-13)
    weights = [p.numel() for p in small.parameters() if p.ndim > 1]
    assert sum(weights) == stored_numbers("units", masks)
    assert small[0].out_channels == small[1].num_features == max(1, round(share * 6))
    assert small[9].out_features == 5
    for name, mask in masks.items():
        into = mask.flatten(1)
        living = into.any(1)
        assert torch.equal(living, keep[name])
        assert (into[living] == into[living][0]).all()  # one entry for each unit


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_units_fill_their_budget_and_no_more(density):
    model = models.build("lenet300_100", num_classes=10)
    keep = units_within(model, density)
    stored = sum(int(mask.sum()) for mask in unit_masks(model, keep).values())
    total = 784 * 300 + 300 * 100 + 100 * 10
    step = (784 + 100) + (300 + 10)  # one unit of each hidden layer, at most
    assert density * total - step < stored <= density * total


def test_the_largest_units_stay():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 3.0, 2.0])[:, None].expand(3, 4))
    keep = largest_units(nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 2)), 2 / 3)
    assert keep["0"].tolist() == [False, True, True]
    assert keep["2"].tolist() == [True, True]


def test_networks_that_are_no_chain_are_refused():
    with pytest.raises(UnsupportedError, match="expected an nn"):
        unit_masks(models.build("resnet20", num_classes=10), {})
    odd = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(UnsupportedError, match="LayerNorm"):
        unit_masks(odd, {"0": torch.ones(4, dtype=torch.bool)})
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UnsupportedError, match="groups"):
        unit_masks(grouped, {"0": torch.ones(4, dtype=torch.bool)})


def test_wrong_arguments_are_named():
    with pytest.raises(UnsupportedError, match="kind: expected one of identity"):
        make_basis("fourier", torch.empty(3, 3))
    with pytest.raises(UnsupportedError, match="2 or 4 dimensions"):
        make_basis("dct", torch.empty(3, 3, 3))
    with pytest.raises(ShapeError, match="mask"):
        keep_coefficients(nn.Linear(3, 3), make_basis("dct", torch.empty(3, 3)), torch.ones(3) > 0)
    with pytest.raises(ValueError, match="sparsity"):
        prune_coefficients({"a": torch.ones(3)}, 1.0)
