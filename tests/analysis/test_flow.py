"""Gradient norms, solutions, spectra and initialisation against their definitions in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator, eigsh
from torch import nn
from torch.nn import functional as F

from sparsekd.analysis.flow import (
    cosine,
    disagreement,
    distance,
    ensemble_accuracy,
    gradient_norms,
    hessian,
    interpolate,
    lanczos,
    path,
    plane,
    probabilities,
    weight_vector,
)
from sparsekd.errors import ShapeError
from sparsekd.nn import SparseLinear, densify, sparse_modules, sparsify
from sparsekd.nn.init import kaiming_
from sparsekd.topology import Topology
from sparsekd.train import evaluate


def convnet(seed: int = 0, sparsity: float | None = 0.6, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)),
    )
    if sparsity is not None:
        sparsify(model, sparsity, distribution="uniform", seed=seed)
    return model.double()


def batch(count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(10, (count,), generator=generator)


def masked_norm(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return the norm over stored weights, and over all positions, by dense autograd."""
    dense = densify(copy.deepcopy(model))
    F.cross_entropy(dense(x), y).backward()
    kept = every = 0.0
    masks = {f"{name}.weight": m.topology.mask() for name, m in sparse_modules(model)}
    for name, parameter in dense.named_parameters():
        assert parameter.grad is not None
        mask = masks.get(name, torch.ones_like(parameter))
        kept += (parameter.grad * mask).square().sum().item()
        every += parameter.grad.square().sum().item()
    return math.sqrt(kept), math.sqrt(every)


def test_the_gradient_norm_is_that_of_the_masked_dense_gradient():
    model, (x, y) = convnet(), batch()
    norms = gradient_norms(model, x, y)
    kept, every = masked_norm(model, x, y)
    assert norms.total == pytest.approx(kept, rel=1e-12)
    assert norms.total < every
    assert math.hypot(*norms.layers.values()) == pytest.approx(norms.total, rel=1e-12)
    assert list(norms.layers) == ["0", "1", "4", "7"]


def test_measuring_the_gradient_changes_nothing():
    model, (x, y) = convnet(dropout=0.5), batch()
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    generator = torch.get_rng_state()
    first, second = gradient_norms(model, x, y), gradient_norms(model, x, y)
    assert first == second
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))


def test_a_small_step_lowers_the_loss_by_its_rate_times_the_squared_norm():
    model, (x, y), lr = convnet(sparsity=0.5), batch(), 1e-6
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    expected = lr * gradient_norms(model, x, y).total ** 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(lr * parameter.grad)
    assert (loss - F.cross_entropy(model(x), y)).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("law", ["normal", "uniform"])
@pytest.mark.parametrize("fan_in", [1, 2, 7, 100])
def test_the_variance_of_a_preactivation_does_not_depend_on_the_fan_in(law, fan_in):
    rows, gain = 20_000, math.sqrt(2)
    mask = torch.zeros(rows, 100, dtype=torch.bool)
    mask[:, :fan_in] = True
    layer = SparseLinear.from_dense(nn.Linear(100, rows, bias=False), mask=mask).double()
    generator = torch.Generator().manual_seed(fan_in)
    kaiming_(layer.values, layer.topology, law=law, gain=gain, generator=generator)
    x = torch.randn(100, dtype=torch.float64, generator=generator)
    x *= math.sqrt(fan_in) / x[:fan_in].norm()  # unit second moment over the inputs that count
    # The fourth moment of a preactivation is at most that of a normal: 3 variance^2.
    error = 5 * gain**2 * math.sqrt(2 / rows)
    assert layer(x[None]).square().mean().item() == pytest.approx(gain**2, abs=error)
    assert not layer.dense_weight()[~mask].any()


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_sparse_initialisation_of_a_full_mask_is_that_of_he(law):
    topology = Topology.from_mask(torch.ones(64, 9, dtype=torch.bool))
    generator = torch.Generator().manual_seed(0)
    values = kaiming_(
        torch.empty(576), topology, law=law, gain=math.sqrt(2), generator=generator
    ).sort()[0]
    dense = torch.empty(64, 9)
    torch.manual_seed(1)
    fill = nn.init.kaiming_normal_ if law == "normal" else nn.init.kaiming_uniform_
    fill(dense, nonlinearity="relu")
    # Kolmogorov-Smirnov at 0.1 %: both are draws of one law.
    below = torch.searchsorted(values, dense.flatten().sort()[0]) / 576
    gap = (below - torch.arange(576) / 576).abs().max().item()
    assert gap < 1.95 * math.sqrt(2 / 576)


def test_a_path_ends_at_the_two_networks(digits):
    a, b = convnet(1).float(), convnet(2).float()
    for model in (a, b):
        torch.optim.swa_utils.update_bn(digits.test.batches(500), model)
    points = path(a, b, [0.0, 0.5, 1.0], digits.test)
    for model, point in ((a, points[0]), (b, points[2])):
        assert evaluate(model, digits.test).loss == pytest.approx(point.loss, rel=1e-5)


@pytest.mark.parametrize("alpha", [-0.2, 0.0, 0.3, 1.0, 1.2])
def test_interpolation_is_linear_on_the_union_of_the_topologies(alpha):
    a, b = convnet(1), convnet(2)
    mixed = interpolate(a, b, alpha)
    expected = (1 - alpha) * weight_vector(a) + alpha * weight_vector(b)
    torch.testing.assert_close(weight_vector(mixed), expected, rtol=1e-14, atol=1e-15)
    union = (
        dict(sparse_modules(a))["0"].topology.mask() | dict(sparse_modules(b))["0"].topology.mask()
    )
    assert torch.equal(dict(sparse_modules(mixed))["0"].topology.mask(), union)


def test_networks_of_other_sizes_are_refused():
    with pytest.raises(ShapeError, match="parameters"):
        distance(nn.Linear(2, 2), nn.Linear(3, 2))
    with pytest.raises(ShapeError, match="end: expected weight"):
        interpolate(nn.Linear(2, 2), nn.Linear(3, 2), 0.5)


def test_distances_are_those_of_the_dense_weights():
    a, b = convnet(1), convnet(2)
    first, second = densify(copy.deepcopy(a)), densify(copy.deepcopy(b))
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    square = sum((p - q).square().sum().item() for p, q in pairs)
    assert distance(a, b) == pytest.approx(math.sqrt(square), rel=1e-12)
    assert distance(a, a) == 0
    assert cosine(a, a) == pytest.approx(1.0)
    dot = sum((p * q).sum().item() for p, q in pairs)
    norms = weight_vector(a).norm() * weight_vector(b).norm()
    assert cosine(a, b) == pytest.approx(dot / norms.item(), rel=1e-12)


def test_networks_in_a_plane_keep_their_distances():
    corner, along, across = nn.Linear(6, 5), torch.randn(35), torch.randn(35)
    points = []
    for a, b in ((0, 0), (1, 0), (0, 2), (-1, 1.5)):
        model = copy.deepcopy(corner).double()
        shifted = weight_vector(corner) + a * along.double() + b * across.double()
        nn.utils.vector_to_parameters(shifted, model.parameters())
        points.append(model)
    flat = torch.from_numpy(plane(points))
    for i, a in enumerate(points):
        for j, b in enumerate(points):
            assert (flat[i] - flat[j]).norm().item() == pytest.approx(distance(a, b), abs=1e-6)


def test_disagreement_is_symmetric_and_zero_with_oneself(digits):
    a, b = (probabilities(convnet(seed).float(), digits.test) for seed in (1, 2))
    assert disagreement(a, b) == disagreement(b, a) > 0
    assert disagreement(a, a) == 0
    torch.testing.assert_close(a.sum(1), torch.ones(len(a), dtype=torch.float64))


def test_an_ensemble_of_one_network_is_that_network(digits):
    model = convnet().float()
    members = [probabilities(model, digits.test)] * 3
    accuracy = evaluate(model, digits.test).accuracy
    assert ensemble_accuracy(members, digits.test.labels) == pytest.approx(accuracy)
    wrong = torch.tensor([[0.0, 1.0], [0.1, 0.9]])
    right = torch.tensor([[1.0, 0.0], [0.8, 0.2]])
    assert ensemble_accuracy([wrong, right, right], torch.tensor([0, 0])) == 1.0


def test_the_hessian_is_that_of_dense_autograd_on_the_stored_weights(backend):
    model, (x, y) = convnet(sparsity=0.6).eval(), batch(12)
    operator = hessian(model, x, y)
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((operator.shape[0], 6))
    ours = operator @ vectors
    dense = densify(copy.deepcopy(model))
    names = [name for name, _ in dense.named_parameters()]
    sizes = [p.numel() for p in dense.parameters()]
    shapes = [p.shape for p in dense.parameters()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = [part.view(s) for part, s in zip(flat.split(sizes), shapes, strict=True)]
        return F.cross_entropy(
            torch.func.functional_call(dense, dict(zip(names, parts, strict=True)), (x,)), y
        )

    flat = nn.utils.parameters_to_vector(dense.parameters()).detach()
    whole = torch.autograd.functional.hessian(loss, flat)
    # The operator's coordinates are in the order of the sparse model's own parameters.
    start = dict(zip(names, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    masks = {name: m.topology.mask().flatten() for name, m in sparse_modules(model)}
    positions = []
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf == "values":
            positions.append(start[f"{layer}.weight"] + masks[layer].nonzero().squeeze(1))
        else:
            positions.append(start[name] + torch.arange(parameter.numel()))
    index = torch.cat(positions)
    expected = whole[index][:, index].numpy() @ vectors
    np.testing.assert_allclose(ours, expected, atol=1e-11)


def test_lanczos_finds_the_ends_of_the_hessian_spectrum():
    model, (x, y) = convnet(sparsity=0.6).eval(), batch(30)
    operator = hessian(model, x, y)
    spectrum = lanczos(operator, steps=60)
    top = eigsh(operator, k=2, which="LA", return_eigenvectors=False)
    assert spectrum.eigenvalues[-1] == pytest.approx(top.max(), rel=1e-6)
    assert spectrum.weights.sum() == pytest.approx(1.0)


def test_lanczos_on_a_small_matrix_gives_every_eigenvalue():
    generator = np.random.default_rng(0)
    half = generator.standard_normal((8, 8))
    matrix = half + half.T
    spectrum = lanczos(aslinearoperator(matrix), steps=50)
    np.testing.assert_allclose(spectrum.eigenvalues, np.linalg.eigvalsh(matrix), atol=1e-10)
    few = lanczos(aslinearoperator(np.diag([0.0, 0.0, 0.0, 5.0])), steps=4)
    np.testing.assert_allclose(few.eigenvalues, [0.0, 5.0], atol=1e-12)
