"""Loops whose `.grad` is that of several backward passes, and a dense twin to compare with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from sparsekd import dst as methods
from sparsekd import sparsify
from sparsekd.nn import SparseConv2d, SparseLinear, densify, sparse_modules

Loop = Callable[[nn.Module, torch.optim.Optimizer, Callable[[nn.Module], Tensor]], None]


def network(layout: str = "csr") -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 2, stride=2, groups=2)),
        *(nn.Tanh(), nn.Flatten(), nn.Linear(72, 6)),
    )
    return sparsify(model.double(), 0.5, seed=1, layout=layout)


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=generator)


def weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the sparse layers' values, or the dense layers' weights."""
    kinds = SparseConv2d, SparseLinear, nn.Conv2d, nn.Linear
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    return [m.values if hasattr(m, "values") else m.weight for m in layers]


def loss(model: nn.Module, seed: int, weight: float = 1.0) -> Tensor:
    return weight * model(batch(seed)).square().sum()


# Each loop runs on the sparse model and on its dense twin; `stored` gives all stored weights.


def extra_backward(model, opt, stored):
    """Adversarial training: the first backward is for the input alone, but writes `.grad`."""
    x = batch(0).requires_grad_()
    model(x).square().sum().backward()
    opt.zero_grad(set_to_none=False)
    model((x + 0.1 * x.grad.sign()).detach()).square().sum().backward()


def extra_backward_after_data_zero(model, opt, stored):
    loss(model, 0).backward()
    for p in model.parameters():
        p.grad.data.zero_()  # which no version counter sees
    loss(model, 1).backward()


def pgd(model, opt, stored):
    x = batch(0)
    for _ in range(3):
        x = x.detach().requires_grad_()
        opt.zero_grad(set_to_none=False)
        model(x).square().sum().backward()
        x = x + 0.01 * x.grad.sign()
    opt.zero_grad(set_to_none=False)
    model(x.detach()).square().sum().backward()


def sam(model, opt, stored):
    """Sharpness-aware minimisation: the gradient at a point uphill."""
    loss(model, 0).backward()
    steps = [0.05 * p.grad * (p != 0) for p in weights(model)]  # a twin's zeros stay
    with torch.no_grad():
        for p, step in zip(weights(model), steps, strict=True):
            p.add_(step)
    opt.zero_grad(set_to_none=False)
    loss(model, 0).backward()
    with torch.no_grad():
        for p, step in zip(weights(model), steps, strict=True):
            p.sub_(step)


def input_gradients_between(model, opt, stored):
    loss(model, 0).backward()
    x = batch(1).requires_grad_()
    torch.autograd.grad(model(x).square().sum(), x)
    loss(model, 2).backward()
    torch.autograd.grad(model(x).square().sum(), x)


def input_gradients_before(model, opt, stored):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = batch(1).requires_grad_()
    torch.autograd.grad(model(x).square().sum(), x)
    loss(model, 2).backward()


def weight_gradients_between(model, opt, stored):
    loss(model, 0).backward()
    torch.autograd.grad(loss(model, 1), list(model.parameters()))
    loss(model, 2).backward()


def backward_for_others(model, opt, stored):
    loss(model, 0).backward()
    loss(model, 1).backward(inputs=[model[0].bias])


def accumulate(model, opt, stored):
    for seed in range(5):
        loss(model, seed, 0.2).backward()


def penalty(model, opt, stored):
    """A gradient penalty, added in a backward pass of its own, after one that was zeroed."""
    loss(model, 4).backward()
    opt.zero_grad(set_to_none=False)
    loss(model, 0).backward()
    x = batch(1).requires_grad_()
    (gx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    gx.square().sum().backward()


def retained(model, opt, stored):
    value = loss(model, 0)
    value.backward(retain_graph=True)
    value.backward()


def create_graph(model, opt, stored):
    loss(model, 0).backward(create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(model, 1).backward(create_graph=True)


def checkpointed(model, opt, stored):
    loss(model, 3).backward()
    opt.zero_grad(set_to_none=False)
    for reentrant in (True, False):
        x = batch(int(reentrant)).requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()


def clipped(model, opt, stored):
    loss(model, 0).backward()
    scale = 0.5 / torch.cat([stored(p, p.grad) for p in weights(model)]).norm()
    for p in model.parameters():
        p.grad.mul_(scale)


def unscaled_between(model, opt, stored):
    loss(model, 0, 1024.0).backward()
    for p in model.parameters():
        p.grad.div_(1024.0)
    loss(model, 1).backward()
    for p in model.parameters():
        p.grad.neg_()


def weight_decay_in_the_loss(model, opt, stored):
    decay = sum(stored(p, p).square().sum() for p in weights(model))
    (loss(model, 0) + 0.1 * decay).backward()


def gradient_hook(model, opt, stored):
    handles = [p.register_hook(lambda g: 2 * g) for p in weights(model)]
    loss(model, 0).backward()
    for handle in handles:
        handle.remove()


LOOPS = [
    extra_backward, extra_backward_after_data_zero, pgd, sam, input_gradients_between,
    input_gradients_before, weight_gradients_between, backward_for_others, accumulate, penalty,
    retained, create_graph, checkpointed, clipped, unscaled_between, weight_decay_in_the_loss,
    gradient_hook,
]  # fmt: skip


def twins(layout: str = "csr") -> tuple[nn.Module, nn.Module, Callable, Callable]:
    """Return a sparse model, its dense twin, and what picks stored weights of either's tensors."""
    model = network(layout)
    twin = densify(copy.deepcopy(model))
    masks = {id(twin.get_submodule(n).weight): m.topology.mask() for n, m in sparse_modules(model)}
    return model, twin, lambda p, t: t, lambda p, t: t[masks[id(p)]]


def run(loop: Loop, layout: str = "csr", **options) -> tuple[nn.Module, nn.Module, methods.RigL]:
    model, twin, every, stored = twins(layout)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = methods.RigL(model, opt, drop_fraction=0.4, every=1, until=100, **options)
    loop(model, opt, every)
    loop(twin, torch.optim.SGD(twin.parameters(), lr=0.1), stored)
    return model, twin, updater


def assert_gradients(updater: methods.Updater, twin: nn.Module) -> None:
    for name, module in updater.modules.items():
        expected = twin.get_submodule(name).weight.grad.detach()
        found = updater.gradient(name).view_as(expected)
        scale = expected.abs().max()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale.item())
        at_nonzeros = found[module.topology.mask()]
        assert torch.equal(at_nonzeros, module.values.grad)


METHODS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], methods.Updater]] = {
    "RigL": lambda m, o: methods.RigL(m, o, drop_fraction=0.4, every=1, until=9),
    "GraNet": lambda m, o: methods.GraNet(m, o, sparsity=0.7, every=1, until=9),
    "SNFS": lambda m, o: methods.SNFS(m, o, drop_fraction=0.4, every=1, until=9),
    "SNFS shared": lambda m, o: methods.SNFS(
        m, o, drop_fraction=0.4, every=1, until=9, redistribute=True
    ),
    "RigLSG": lambda m, o: methods.RigLSG(m, o, drop_fraction=0.4, every=1, until=9),
    "RigLSM": lambda m, o: methods.RigLSM(m, o, drop_fraction=0.4, every=1, until=9),
    "SRigL": lambda m, o: methods.SRigL(m, o, drop_fraction=0.4, every=1, until=9),
    "TopKAST": lambda m, o: methods.TopKAST(
        m, o, sparsity=0.7, backward_sparsity=0.5, every=1, until=9
    ),
    "SET": lambda m, o: methods.SET(m, o, drop_fraction=0.4, every=1, until=9),
    "GMP": lambda m, o: methods.GMP(m, o, sparsity=0.7, every=1, until=9),
}
