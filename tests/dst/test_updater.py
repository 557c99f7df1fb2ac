"""What one update does: counts, candidates, values, state, gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsekd.dst import SET, RigL, Static, Updater
from sparsekd.errors import OptimizerStateError
from sparsekd.nn import SparseLinear, densify, sparse_modules
from sparsekd.ops.growth import Block

METHODS = pytest.mark.parametrize("method", [SET, RigL])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def backward(model: nn.Module, seed: int = 0) -> None:
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()


def train(model: nn.Module, opt: torch.optim.Optimizer, dst: Updater, steps: int) -> list[bool]:
    rewired = []
    for _ in range(steps):
        opt.zero_grad()
        backward(model, dst.iteration)
        rewired.append(dst.step())
        if not rewired[-1]:
            opt.step()
    return rewired


def at_positions(module, slots: Tensor) -> Tensor:
    """Spread one number per nonzero over the flat dense weight."""
    return torch.zeros(module.topology.numel, dtype=slots.dtype).index_copy(
        0, module.topology.flat_indices(), slots.detach()
    )


def naive_rigl(weight: Tensor, mask: Tensor, gradient: Tensor, k: int) -> Tensor:
    """Algorithm 1 by sorting tuples, on flat tensors."""
    active = [p for p in range(len(mask)) if mask[p]]
    dropped = sorted(active, key=lambda p: (abs(weight[p].item()), p))[:k]
    kept = set(active) - set(dropped)
    free = [p for p in range(len(mask)) if p not in kept]
    grown = sorted(free, key=lambda p: (-abs(gradient[p].item()), p))[:k]
    new = torch.zeros_like(mask)
    new[list(kept) + grown] = True
    return new


def test_rigl_follows_algorithm_1(make_network):
    """Masks, values and momentum equal those of the naive algorithm on a dense twin."""
    model = make_network()
    opt = sgd(model)
    dst = RigL(model, opt, drop_fraction=0.4, every=3, until=100)
    train(model, opt, dst, 2)
    opt.zero_grad()
    twin = densify(copy.deepcopy(model))
    backward(model, 7)
    backward(twin, 7)
    before = {
        name: (m.topology.mask().view(-1), m.dense_weight().view(-1))
        for name, m in sparse_modules(model)
    }
    momentum = {
        name: at_positions(m, opt.state[m.values]["momentum_buffer"])
        for name, m in sparse_modules(model)
    }

    assert dst.step()

    fraction = 0.4 / 2 * (1 + math.cos(math.pi * 3 / 100))
    for name, module in sparse_modules(model):
        mask, weight = before[name]
        gradient = twin.get_submodule(name).weight.grad.view(-1)
        expected = naive_rigl(weight, mask, gradient, math.floor(fraction * int(mask.sum())))
        new = module.topology.mask().view(-1)
        assert not torch.equal(new, mask)
        assert torch.equal(new, expected)
        assert torch.equal(module.dense_weight().view(-1), weight * new)
        carried = at_positions(module, opt.state[module.values]["momentum_buffer"])
        assert torch.equal(carried, momentum[name] * new)


@METHODS
def test_nnz_stays_exact_and_counts_match_over_many_updates(method, make_network):
    model = make_network()
    opt = sgd(model)
    dst = method(model, opt, drop_fraction=0.5, every=1, until=60)
    target = {name: m.topology.nnz for name, m in sparse_modules(model)}
    for t in range(1, 60):
        masks = {name: m.topology.mask() for name, m in sparse_modules(model)}
        opt.zero_grad()
        backward(model, t)
        rewired = dst.step()
        assert rewired == bool(dst.last_update)
        for name, module in sparse_modules(model):
            assert module.topology.nnz == target[name] == len(module.values)
            k = math.floor(0.5 / 2 * (1 + math.cos(math.pi * t / 60)) * target[name])
            changed = int((module.topology.mask() & ~masks[name]).sum())
            if k == 0:
                assert name not in dst.last_update
                assert changed == 0
                continue
            update = dst.last_update[name]
            assert update.dropped == update.grown == k
            assert changed == k - update.regrown
        if not rewired:
            opt.step()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 9),
    sparsity=st.floats(0, 1),
    fraction=st.floats(0, 1),
    method=st.sampled_from([SET, RigL]),
    seed=st.integers(0, 1000),
)
def test_a_thousand_random_updates_keep_nnz(rows, cols, sparsity, fraction, method, seed):
    """40 updates on each of 25 layers, among them empty and full ones and one-weight layers."""
    layer = SparseLinear(cols, rows, sparsity=sparsity, seed=seed).double()
    opt = sgd(layer)
    dst = method(layer, opt, drop_fraction=fraction, every=1, until=10**9, seed=seed)
    nnz = layer.topology.nnz
    generator = torch.Generator().manual_seed(seed)
    for _ in range(40):
        opt.zero_grad()
        layer(torch.randn(2, cols, generator=generator).double()).square().sum().backward()
        kept_before = at_positions(layer, layer.values)
        if dst.step():
            mask = layer.topology.mask().view(-1)
            assert torch.equal(at_positions(layer, layer.values), kept_before * mask)
        opt.step()
        assert layer.topology.nnz == nnz
        momentum = opt.state[layer.values]["momentum_buffer"]
        assert momentum.shape == layer.values.shape == (nnz,)


@METHODS
def test_updates_happen_at_multiples_of_every_before_until(method, make_network):
    model = make_network()
    opt = sgd(model)
    rewired = train(model, opt, method(model, opt, every=3, until=9), 12)
    assert [t for t, happened in enumerate(rewired, 1) if happened] == [3, 6]


def test_masks_are_frozen_from_until_on(make_network):
    model = make_network()
    opt = sgd(model)
    dst = RigL(model, opt, every=2, until=6)
    train(model, opt, dst, 5)
    frozen = {name: m.topology for name, m in sparse_modules(model)}
    train(model, opt, dst, 10)
    assert all(m.topology is frozen[name] for name, m in sparse_modules(model))


def test_grown_weights_leave_the_output_bit_equal(make_network):
    """T5: with nothing of weight dropped, growth alone changes no logit."""
    model = make_network().eval()
    with torch.no_grad():
        for _, module in sparse_modules(model):
            small = module.values.abs() < module.values.abs().quantile(0.4)
            module.values[small] = 0.0
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    before = model(x)
    opt = sgd(model)
    dst = RigL(model, opt, drop_fraction=0.3, every=1, until=100)
    backward(model)
    masks = [m.topology for _, m in sparse_modules(model)]
    assert dst.step()
    assert all(m.topology != old for (_, m), old in zip(sparse_modules(model), masks, strict=True))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-15)


def test_a_dead_layer_with_zero_gradients_keeps_its_nnz():
    """T14: every candidate ties at 0; none of the active ones may win a tie."""
    layer = SparseLinear(20, 10, sparsity=0.3, seed=0)
    opt = sgd(layer)
    dst = RigL(layer, opt, drop_fraction=0.5, every=1, until=100)
    kept = layer.values.detach().abs().sort(descending=True).values[: 140 - 69]
    (layer(torch.randn(4, 20)) * 0).sum().backward()
    assert dst.step()
    assert layer.topology.nnz == 140
    assert dst.last_update[""].grown == 69
    survivors = layer.values.detach().abs().sort(descending=True).values[: 140 - 69]
    assert torch.equal(survivors, kept)


@METHODS
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_empty_and_full_layers_are_left_alone_without_skipping_the_step(method, sparsity):
    """T15: there is nothing to move, so the optimizer steps as ever."""
    layer = SparseLinear(6, 4, sparsity=sparsity, seed=0)
    opt = sgd(layer)
    dst = method(layer, opt, drop_fraction=0.5, every=1, until=100)
    topology = layer.topology
    layer(torch.randn(2, 6)).sum().backward()
    assert not dst.step()
    assert layer.topology is topology
    assert dst.last_update == {}


@METHODS
def test_a_drop_fraction_of_zero_is_static(method, make_network):
    trained = []
    for make in (
        lambda m, o: method(m, o, drop_fraction=0.0, every=2, until=100),
        lambda m, o: Static(m, o, drop_fraction=0.3, every=2, until=100, seed=0),
    ):
        model = make_network()
        opt = sgd(model)
        assert not any(train(model, opt, make(model, opt), 6))
        trained.append(model.state_dict())
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name])


def test_everything_may_be_dropped_at_once():
    layer = SparseLinear(6, 4, sparsity=0.5, seed=0).double()
    opt = sgd(layer)
    dst = SET(layer, opt, drop_fraction=1.0, every=1, until=10**12)
    dst.schedule = lambda iteration: 1.0
    before = at_positions(layer, layer.values)
    assert dst.step()
    assert dst.last_update[""].dropped == 12
    assert torch.equal(at_positions(layer, layer.values), before * layer.topology.mask().view(-1))


def test_frozen_layers_are_not_rewired(make_network):
    model = make_network()
    model[0].values.requires_grad_(False)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    dst = RigL(model, opt, every=1, until=100)
    frozen = model[0].topology
    backward(model)
    assert dst.step()
    assert model[0].topology is frozen
    assert set(dst.last_update) == {"3", "6"}


def test_set_draws_from_its_own_generator(make_network):
    """The seed decides, and torch's global generator is neither read nor advanced."""
    masks = []
    for seed, noise in ((0, 0), (0, 1), (1, 0)):
        model = make_network()
        dst = SET(model, sgd(model), every=1, until=100, seed=seed)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        assert dst.step()
        assert torch.equal(torch.get_rng_state(), state)
        masks.append(model[3].topology)
    assert masks[0] == masks[1] != masks[2]


@METHODS
def test_gradients_follow_their_weights(method, make_network):
    """skip_sgd_on_update=False: the optimizer steps next, with no gradient of another weight."""
    model = make_network()
    opt = sgd(model)
    dst = method(model, opt, every=1, until=100, skip_sgd_on_update=False)
    backward(model)
    before = {
        name: (m.topology.mask().view(-1), at_positions(m, m.values.grad))
        for name, m in sparse_modules(model)
    }
    assert dst.step() is False
    assert dst.last_update
    for name, module in sparse_modules(model):
        mask, gradient = before[name]
        new = module.topology.mask().view(-1)
        assert torch.equal(at_positions(module, module.values.grad), gradient * (mask & new))
    opt.step()


def test_weight_decay_revives_nothing(make_network):
    """T18: there is no weight outside the topology that could come back."""
    model = make_network()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    dst = RigL(model, opt, every=2, until=100)
    train(model, opt, dst, 7)
    for _, module in sparse_modules(model):
        outside = ~module.topology.mask()
        assert module.dense_weight()[outside].abs().sum() == 0


def test_a_nan_weight_is_an_error_that_names_the_layer(make_network):
    model = make_network()
    dst = SET(model, sgd(model), every=1, until=100)
    model[3].values.data[1] = math.nan
    with pytest.raises(ValueError, match=r"3\.values: expected numbers, got NaN"):
        dst.step()


def test_an_optimizer_that_cannot_follow_is_found_out_before_anything_changes(make_network):
    model = make_network()
    opt = sgd(model)
    dst = SET(model, opt, every=1, until=100)
    backward(model)
    opt.step()
    opt.state[model[6].values]["factor"] = torch.zeros(2)
    before = [m.topology for _, m in sparse_modules(model)]
    with pytest.raises(OptimizerStateError, match="factor"):
        dst.step()
    assert all(m.topology is old for (_, m), old in zip(sparse_modules(model), before, strict=True))


def test_a_model_without_sparse_modules_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"model: .*sparsify"):
        RigL(model, sgd(model), every=1, until=10)


def test_an_optimizer_of_other_parameters_is_refused(make_network):
    model, other = make_network(), make_network()
    with pytest.raises(OptimizerStateError, match=r"0\.values"):
        SET(model, sgd(other), every=1, until=10)


@pytest.mark.parametrize("wrong", [{"drop_fraction": 2}, {"every": 0}, {"until": -1}])
@METHODS
def test_arguments_out_of_range_are_refused(method, wrong, make_network):
    model = make_network()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        method(model, sgd(model), **({"every": 10, "until": 100} | wrong))


def test_growing_at_the_smallest_gradients_picks_the_other_end(make_network):
    class Opposite(RigL):
        def gradient_blocks(self, name: str) -> Iterator[Block]:
            for row, col, block in super().gradient_blocks(name):
                yield row, col, 1 / (block.abs() + 1e-30)

    grown = []
    for method in (RigL, Opposite):
        model = make_network()
        opt = sgd(model)
        dst = method(model, opt, drop_fraction=0.2, every=1, until=1000)
        before = model[3].topology.mask()
        backward(model)
        dst.step()
        grown.append(model[3].topology.mask() & ~before)
    assert grown[0].any()
    assert not (grown[0] & grown[1]).any()
