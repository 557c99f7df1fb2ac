"""Top-KAST against a dense network with masks; which weights take part, and what they cost."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekd.dst import TopKAST
from sparsekd.errors import UnsupportedError
from sparsekd.nn import SparseLinear, densify, make_capturable, sparse_modules
from sparsekd.sparsity import allocate, topk_mask

OPTIONS = {"sparsity": 0.7, "backward_sparsity": 0.4, "every": 3, "until": 14, "penalty": 1e-2}


def topkast(model: nn.Module, **options) -> TopKAST:
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return TopKAST(model, opt, **(OPTIONS | options))


class Naive:
    """Dense weights; the forward pass masks them to A, the gradient goes to B."""

    def __init__(self, model: nn.Module) -> None:
        self.model = densify(copy.deepcopy(model))
        self.momentum: dict[str, Tensor] = {}
        self.sets: dict[str, tuple[Tensor, Tensor]] = {}
        self.choose()

    def layers(self):
        return [
            (n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
        ]

    def choose(self) -> None:
        for name, layer in self.layers():
            size, n = layer.weight.detach().abs(), layer.weight.numel()
            self.sets[name] = topk_mask(size, round(0.3 * n)), topk_mask(size, round(0.6 * n))
            if name in self.momentum:
                self.momentum[name] *= self.sets[name][1]

    def step(self, x: Tensor, trains_extra: bool, chooses: bool) -> None:
        tensors = dict(self.model.named_parameters())
        masked = {}
        for name, layer in self.layers():
            masked[name] = (layer.weight.detach() * self.sets[name][0]).requires_grad_()
            tensors[f"{name}.weight"] = masked[name]
        others = {k: p for k, p in tensors.items() if not k.endswith(".weight") or p.ndim == 1}
        torch.func.functional_call(self.model, tensors, (x,)).square().mean().backward()
        updates = {}
        for name, layer in self.layers():
            inner, outer = self.sets[name][0], self.sets[name][1] & ~self.sets[name][0]
            weight, gradient = layer.weight.detach(), masked[name].grad
            gradient = gradient + 1e-2 * weight.sign() * (inner + outer.double() / 0.3)
            updates[name] = gradient * (inner | outer if trains_extra else inner)
        before = dict(self.sets)
        if chooses:
            self.choose()
        with torch.no_grad():
            for name, layer in self.layers():
                trained = self.sets[name][1] if trains_extra else self.sets[name][0]
                gradient = updates[name] * (before[name][1] & trained)
                gradient = gradient + 1e-3 * layer.weight * trained
                old = self.momentum.get(name, torch.zeros_like(gradient))
                self.momentum[name] = torch.where(trained, 0.9 * old + gradient, old)
                layer.weight -= 0.1 * self.momentum[name] * trained
            for key, parameter in others.items():
                gradient = parameter.grad + 1e-3 * parameter
                self.momentum[key] = 0.9 * self.momentum.get(key, 0.0) + gradient
                parameter -= 0.1 * self.momentum[key]
                parameter.grad = None


def test_it_trains_like_masked_dense_weights(make_dense_network):
    model = make_dense_network()
    naive = Naive(model)
    dst = topkast(model)
    for t in range(1, 18):
        x = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(t)).double()
        dst.optimizer.zero_grad()
        model(x).square().mean().backward()
        assert dst.step() is False
        dst.optimizer.step()
        naive.step(x, trains_extra=t < 14, chooses=t % 3 == 0 and t < 14)
        for name, layer in naive.layers():
            torch.testing.assert_close(dst.weights(name), layer.weight, rtol=0, atol=1e-12)
            assert torch.equal(dst.modules[name].topology.mask(), naive.sets[name][0])


def test_sets_are_nested_exact_and_what_is_outside_rests(make_dense_network, train):
    model = make_dense_network()
    dst = topkast(model)
    for _ in range(12):
        rest = {name: dst.weights(name) for name in dst.modules}
        train(dst, 1)
        for name, module in sparse_modules(model):
            inner, outer = module.topology.mask(), dst._outside.topologies[name].mask()
            n = module.topology.numel
            assert int(inner.sum()) == len(module.values) == round(0.3 * n)
            assert int(outer.sum()) == len(dst.extra[name]) == round(0.6 * n) - round(0.3 * n)
            assert not (inner & outer).any()
            asleep = ~(inner | outer)
            assert torch.equal(dst.weights(name)[asleep], rest[name][asleep])


def test_a_distribution_shares_both_sets_between_layers(make_dense_network, train):
    model = make_dense_network()
    dst = topkast(model, distribution="erk")
    shapes = {name: tuple(m.topology.shape) for name, m in sparse_modules(model)}
    train(dst, 4)
    sizes = {name: (m.topology.nnz, len(dst.extra[name])) for name, m in dst.modules.items()}
    inner, outer = allocate(shapes, 0.7, "erk"), allocate(shapes, 0.4, "erk")
    assert sizes == {name: (inner[name], outer[name] - inner[name]) for name in shapes}


def test_a_gradient_of_the_input_alone_does_not_count(make_dense_network):
    model = make_dense_network().eval()
    dst = topkast(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(model(x).square().sum(), x)
    model(x.detach()).square().sum().backward()
    found = {name: extra.grad.clone() for name, extra in dst.extra.items()}
    dst.optimizer.zero_grad()
    model(x.detach()).square().sum().backward()
    for name, extra in dst.extra.items():
        assert torch.equal(found[name], extra.grad)


def test_several_backward_passes_add_up(make_dense_network):
    model = make_dense_network().eval()
    dst = topkast(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    once = {name: extra.grad.clone() for name, extra in dst.extra.items()}
    model(x).square().sum().backward()
    for name, extra in dst.extra.items():
        torch.testing.assert_close(extra.grad, 2 * once[name], rtol=1e-14, atol=0)


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_resuming_at_any_step_is_bit_equal(make_optimizer, make_dense_network, train):
    def start(seed: int) -> TopKAST:
        model = make_dense_network(seed, torch.float32)
        options = {"momentum": 0.9} if make_optimizer is torch.optim.SGD else {}
        return TopKAST(model, make_optimizer(model.parameters(), lr=0.01, **options), **OPTIONS)

    def save(dst: TopKAST) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (dst, dst.model, dst.optimizer)], file)
        file.seek(0)
        return file

    straight, files = start(0), []
    for _ in range(16):
        files.append(save(straight))
        train(straight, 1)
    for t, file in enumerate(files):
        resumed = start(1)
        train(resumed, t % 3)
        states = torch.load(file, weights_only=True)
        for part, state in zip((resumed, resumed.model, resumed.optimizer), states, strict=True):
            part.load_state_dict(state)
        train(resumed, 16 - t)
        for name in straight.modules:
            assert torch.equal(straight.weights(name), resumed.weights(name))
            assert straight.modules[name].topology == resumed.modules[name].topology
        assert F.mse_loss(straight.extra["3"], resumed.extra["3"]) == 0


@pytest.mark.parametrize(
    "wrong", [{"sparsity": 2}, {"backward_sparsity": 0.9}, {"backward_sparsity": -1}, {"every": 0}]
)
def test_arguments_out_of_range_are_refused(wrong, make_dense_network):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        topkast(make_dense_network(), **wrong)


def test_capturable_layers_are_refused_before_anything_changes() -> None:
    layer = SparseLinear(8, 4, sparsity=0.0)
    dst = topkast(layer, every=1)
    make_capturable(layer)
    layer(torch.ones(2, 8)).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(UnsupportedError, match=r"model: TopKAST .* as it is capturable"):
        dst.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    make_capturable(layer, False)
    assert dst.update(0.0)
