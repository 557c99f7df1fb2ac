"""The identities of averaging sparse networks, in float64, and what superposing leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekd.errors import ShapeError
from sparsekd.nn import (
    SparseConv2d,
    SparseLinear,
    densify,
    make_capturable,
    sparse_modules,
    sparsify,
)
from sparsekd.tickets import superpose
from sparsekd.train import state_hash


def network(seed: int, sparsity: float = 0.7, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)),
    )
    sparsify(model, sparsity, skip="6", seed=seed)
    model.to(dtype)
    model(torch.randn(5, 2, 8, 8, dtype=dtype))  # running statistics of its own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def dense_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return densify(copy.deepcopy(model)).state_dict()


def floats(state):
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def masks(model):
    return {name: module.topology.mask() for name, module in sparse_modules(model)}


def nnz(model):
    return sum(module.topology.nnz for _, module in sparse_modules(model))


@pytest.mark.parametrize("average", ["caa", "cima"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_tickets_average_to_that_ticket_bit_for_bit(average, count):
    ticket = network(0)
    merged = superpose([ticket] * count, average=average, sparsity=0.7)
    assert state_hash(merged.state_dict()) == state_hash(ticket.state_dict())


def test_without_pruning_caa_is_the_mean_of_everything():
    tickets = [network(seed) for seed in range(4)]
    found = dense_state(superpose(tickets, average="caa"))
    states = [dense_state(ticket) for ticket in tickets]
    for name, tensor in floats(found).items():
        expected = torch.stack([state[name] for state in states])
        scale = expected.abs().max().item()
        # three roundings a step, of numbers at most twice the largest
        tolerance = 16 * torch.finfo(torch.float64).eps * scale
        torch.testing.assert_close(tensor, expected.mean(0), rtol=0, atol=tolerance)
    assert found["1.num_batches_tracked"] == states[-1]["1.num_batches_tracked"]


def test_caa_is_exact_where_the_arithmetic_is():
    """Whole multiples of 60 and up to five tickets: no rounding, hence equality."""
    tickets = [network(seed) for seed in range(5)]
    for ticket in tickets:
        with torch.no_grad():
            for tensor in [*ticket.parameters(), ticket[1].running_mean, ticket[1].running_var]:
                tensor.mul_(100).round_().mul_(60)
    for count in (2, 3, 4, 5):
        found = floats(dense_state(superpose(tickets[:count])))
        states = [dense_state(ticket) for ticket in tickets[:count]]
        for name, tensor in found.items():
            total = torch.stack([state[name] for state in states]).sum(0)
            assert torch.equal(tensor, total / count), name


def test_cima_with_beta_1_is_the_last_ticket_support_included():
    tickets = [network(seed) for seed in range(3)]
    with torch.no_grad():
        for _, module in sparse_modules(tickets[-1]):
            module.values[::2] = 0.0  # stored zeros are weights like any other
    merged = superpose(tickets, average="cima", beta=1.0)
    assert state_hash(merged.state_dict()) == state_hash(tickets[-1].state_dict())


def test_cima_weighs_by_powers_of_beta():
    a, b, c = (network(seed) for seed in range(3))
    found = floats(dense_state(superpose([a, b, c], average="cima", beta=0.5)))
    states = [dense_state(ticket) for ticket in (a, b, c)]
    for name, tensor in found.items():
        expected = sum(s[name] * w for s, w in zip(states, (0.25, 0.25, 0.5), strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-13, atol=1e-13)


@settings(deadline=None, max_examples=25)
@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    sparsity=st.sampled_from([0.5, 0.8, 0.95]),
    target=st.floats(0, 1),
)
def test_the_support_is_within_the_union_and_the_count_exact(seeds, sparsity, target):
    tickets = [network(seed, sparsity) for seed in seeds]
    union = {
        name: torch.stack([masks(t)[name] for t in tickets]).any(0) for name in masks(tickets[0])
    }
    stored = sum(int(mask.sum()) for mask in union.values())
    numel = sum(mask.numel() for mask in union.values())
    merged = superpose(tickets, sparsity=None)
    assert all(torch.equal(mask, union[name]) for name, mask in masks(merged).items())
    assert stored <= min(numel, sum(nnz(ticket) for ticket in tickets))
    pruned = superpose(tickets, sparsity=target)
    assert nnz(pruned) == min(round((1 - target) * numel), stored)
    assert all(not (mask & ~union[name]).any() for name, mask in masks(pruned).items())


def test_pruning_back_keeps_the_largest_magnitudes_over_all_layers():
    tickets = [network(seed) for seed in range(3)]
    merged, pruned = superpose(tickets), superpose(tickets, sparsity=0.9)
    weights = torch.cat([m.dense_weight().detach().flatten() for _, m in sparse_modules(merged)])
    kept = torch.cat([mask.flatten() for mask in masks(pruned).values()])
    assert weights[kept].abs().min() > weights[~kept].abs().max()
    expected = torch.where(kept, weights, 0.0)
    found = torch.cat([m.dense_weight().detach().flatten() for _, m in sparse_modules(pruned)])
    assert torch.equal(found, expected)


def test_a_union_with_too_few_weights_stays_as_it_is():
    """A threshold rule would keep every zero instead."""
    tickets = [network(seed, sparsity=0.95) for seed in range(2)]
    assert nnz(superpose(tickets, sparsity=0.2)) == nnz(superpose(tickets))


def test_the_tickets_are_only_read():
    tickets = [network(seed) for seed in range(3)]
    tickets[0](torch.randn(2, 2, 8, 8, dtype=torch.float64)).sum().backward()
    before = [state_hash(ticket.state_dict()) for ticket in tickets]
    merged = superpose(tickets, sparsity=0.9)
    assert [state_hash(ticket.state_dict()) for ticket in tickets] == before
    assert all(parameter.grad is None for parameter in merged.parameters())
    assert all(parameter.grad is not None for parameter in tickets[0].parameters())


def test_tickets_of_a_capturable_network_superpose():
    """No CUDA graph has recorded the superposition, so its tensors may move."""
    tickets = [network(seed) for seed in range(2)]
    expected = state_hash(superpose(tickets, sparsity=0.7).state_dict())
    merged = superpose([make_capturable(ticket) for ticket in tickets], sparsity=0.7)
    assert state_hash(merged.state_dict()) == expected
    assert not any(module.capturable for _, module in sparse_modules(merged))
    assert all(module.capturable for ticket in tickets for _, module in sparse_modules(ticket))


def test_a_module_used_twice_is_averaged_once():
    def shared(seed):
        torch.manual_seed(seed)
        layer, norm = SparseLinear(4, 4, sparsity=0.5, seed=seed), nn.LayerNorm(4)
        return nn.Sequential(layer, norm, layer, norm)

    a, b = shared(0), shared(1)
    merged = superpose([a, b])
    expected = (a[0].dense_weight() + b[0].dense_weight()) / 2
    torch.testing.assert_close(merged[0].dense_weight(), expected, rtol=1e-6, atol=1e-7)


class LargestFloat(TorchDispatchMode):
    """Note the largest floating-point tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.largest = max(self.largest, result.numel())
        return result


def test_no_dense_weight_is_ever_formed():
    tickets = [SparseConv2d(64, 64, 3, sparsity=0.98, seed=seed) for seed in range(3)]
    with LargestFloat() as watch:
        merged = superpose(tickets, sparsity=0.98)
    assert nnz(merged) == nnz(tickets[0])
    assert watch.largest <= 3 * nnz(tickets[0])


@pytest.mark.parametrize(
    "models, arguments, error, text",
    [
        ([], {}, ValueError, "models: expected at least one"),
        ([network(0)], {"average": "mean"}, ValueError, "average: expected 'caa' or 'cima'"),
        ([network(0)], {"average": "cima", "beta": 1.5}, ValueError, "beta: expected"),
        ([network(0)], {"sparsity": 1.5}, ValueError, "sparsity"),
        ([network(0), densify(network(0))], {}, ShapeError, "same layers"),
        ([nn.Linear(3, 2), nn.Linear(3, 4)], {}, ShapeError, r"bias has shape \(2,\) .* \(4,\)"),
    ],
)
def test_refusals(models, arguments, error, text):
    with pytest.raises(error, match=text):
        superpose(models, **arguments)
