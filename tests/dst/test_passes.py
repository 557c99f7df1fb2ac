"""Which gradient growth ranks: the dense one whose entries at the nonzeros are `values.grad`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from sparsekd import dst as methods
from sparsekd import sparsify
from sparsekd.dst.passes import multiple
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


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:no weight is left")
@pytest.mark.parametrize("loop", LOOPS)
def test_the_gradient_is_the_dense_one(loop):
    _, twin, updater = run(loop)
    updater._gradients.settle()
    updater._gradients.warn_of_foreign(type(updater).__name__)
    assert_gradients(updater, twin)


def grown_as_dense(fraction: float, grad: Tensor, values: Tensor, old: Tensor) -> Tensor:
    """Return the mask that RigL leaves, from a dense gradient."""
    k = math.floor(fraction * int(old.sum()))
    weight = torch.zeros(old.shape, dtype=values.dtype).masked_scatter(old, values)
    kept = old & (weight.abs() >= weight[old].abs().sort().values[k])
    score = grad.abs().masked_fill(kept, -1.0)
    return kept | (score >= score.view(-1).sort(descending=True).values[k - 1])


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:no weight is left")
@pytest.mark.parametrize("loop", LOOPS)
def test_the_grown_positions_are_those_of_the_dense_gradient(loop):
    _, twin, updater = run(loop)
    old = {n: (m.topology.mask(), m.values.detach().clone()) for n, m in updater.modules.items()}
    fraction = updater.schedule(1)
    assert updater.step()
    for name, module in updater.modules.items():
        mask, values = old[name]
        grad = twin.get_submodule(name).weight.grad.detach()
        assert torch.equal(module.topology.mask(), grown_as_dense(fraction, grad, values, mask))


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
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:no weight is left")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_extra_backward_changes_nothing_that_is_zeroed_in_place(method, optimizer):
    """Every method ends in the same network as without what was zeroed or never written."""
    found = []
    for extra in (False, True):
        model = network()
        opt = OPTIMIZERS[optimizer](model.parameters())
        updater = METHODS[method](model, opt)
        for step in range(4):
            opt.zero_grad(set_to_none=False)
            if extra:
                loss(model, 10 + step).backward()
                opt.zero_grad(set_to_none=False)
            loss(model, step).backward()
            if extra:
                x = batch(20 + step).requires_grad_()
                torch.autograd.grad(model(x).square().sum(), x)
            loss(model, 30 + step).backward()
            if not updater.step():
                opt.step()
        found.append({n: t.clone() for n, t in model.state_dict().items()})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:no weight is left")
@pytest.mark.parametrize("layout", ["bcsr:2", "fanin", "nm:2:4"])
def test_layouts_with_tiles_follow_as_well(layout):
    masks = []
    for loop in (pgd, last_of_pgd):
        model, _, updater = run(loop, layout)
        assert updater.step()
        masks.append({name: m.topology.mask() for name, m in sparse_modules(model)})
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])


def last_of_pgd(model, opt, stored):
    other = copy.deepcopy(model)
    x = batch(0)
    for _ in range(3):
        x = x.detach().requires_grad_()
        other(x).square().sum().backward()
        x = x + 0.01 * x.grad.sign()
    model(x.detach()).square().sum().backward()


def by_hand(model, opt, stored):
    """Project conflicting gradients, as PCGrad does."""
    each = []
    for seed in (0, 1):
        opt.zero_grad(set_to_none=False)
        loss(model, seed).backward()
        each.append([p.grad.clone() for p in model.parameters()])
    for p, a, b in zip(model.parameters(), *each, strict=True):
        p.grad = a.abs() * 0.5 + b


def value_clipped(model, opt, stored):
    loss(model, 0).backward()
    for p in model.parameters():
        p.grad.clamp_(-0.01, 0.01)


def noisy(model, opt, stored):
    loss(model, 0).backward()
    for p in model.parameters():
        p.grad += 0.01 * torch.randn_like(p)
    loss(model, 1).backward()


def left_over(model, opt, stored):
    """Never zeroed: `.grad` has what an earlier iteration left."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    loss(model, 0).backward()


@pytest.mark.parametrize("loop", [by_hand, value_clipped, noisy, left_over])
@pytest.mark.parametrize("method", ["RigL", "GraNet", "SNFS", "RigLSG", "SRigL", "TopKAST"])
def test_gradients_written_by_hand_are_reported_by_name(loop, method):
    if loop is left_over and method == "TopKAST":
        pytest.skip("its parameter's gradient is carried along with what is left over")
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = METHODS[method](model, opt)
    loop(model, opt, lambda p, t: t)
    with pytest.warns(
        RuntimeWarning, match=rf"{method}: \.grad of 0\.values, 2\.values, 5\.values"
    ):
        updater.step()
    opt.zero_grad(set_to_none=False)
    loss(model, 3).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updater.step()  # zeroed: right again


def test_gradients_that_no_backward_wrote_are_an_error():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = METHODS["RigL"](model, opt)
    parameters = list(model.parameters())
    for p, grad in zip(parameters, torch.autograd.grad(loss(model, 0), parameters), strict=True):
        p.grad = grad
    with pytest.raises(RuntimeError, match=r"no backward pass has written \.grad"):
        updater.step()


def test_a_gradient_that_was_zeroed_after_the_pass_is_none():
    _, _, updater = run(accumulate)
    updater.optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=r"no backward pass has written \.grad"):
        updater.step()


class ReadsWeight(nn.Module):
    """Compute with the dense weight of its layer besides calling it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weight = layer.dense_weight() if isinstance(layer, SparseLinear) else layer.weight
        return layer(x) + nn.functional.linear(x.tanh(), weight)


@pytest.mark.parametrize("method", ["RigL", "TopKAST"])
def test_what_is_computed_with_the_dense_weight_counts(method):
    model = ReadsWeight(SparseLinear(8, 6, sparsity=0.5, seed=0).double())
    twin = densify(copy.deepcopy(model))
    updater = METHODS[method](model, torch.optim.SGD(model.parameters(), lr=0.1))
    if method == "TopKAST":
        twin.layer.weight.data.copy_(model.layer.dense_weight())
    for seed in range(2):
        x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for net in (model, twin):
            net(x).square().sum().backward()
    if method == "RigL":
        torch.testing.assert_close(updater.gradient("layer"), twin.layer.weight.grad)
    else:
        outer = updater._outside.topologies["layer"].mask()
        torch.testing.assert_close(updater.extra["layer"].grad, twin.layer.weight.grad[outer])


def test_the_extra_weights_of_topkast_follow_a_factor():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = METHODS["TopKAST"](model, opt)
    loss(model, 0).backward()
    before = {name: p.grad.clone() for name, p in updater.extra.items()}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # which does not know them
    updater._outside.settle()
    (unclipped,) = torch.autograd.grad(loss(model, 0), model[5].values)
    factor = model[5].values.grad.norm() / unclipped.norm()
    for name, p in updater.extra.items():
        torch.testing.assert_close(p.grad, factor * before[name])


def test_nothing_of_a_pass_that_wrote_nothing_is_kept():
    model = network()
    updater = METHODS["RigL"](model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = batch(0).requires_grad_()
    for _ in range(3):
        torch.autograd.grad(model(x).square().sum(), x)
    assert all(not record.passes._pending for record in updater._gradients._records.values())
    assert len(updater._gradients) == 0


def test_other_values_at_the_same_positions_do_not_count():
    model = nn.Sequential(
        SparseLinear(8, 6, sparsity=0.5, seed=0), SparseLinear(6, 4, sparsity=0.5)
    )
    model[1].values.requires_grad_(False)
    updater = METHODS["RigL"](model, torch.optim.SGD([model[0].values], lr=0.1))
    others = {n: torch.ones_like(p).requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, others, torch.ones(2, 8)).sum().backward()
    assert len(updater._gradients) == 0
    twin = densify(copy.deepcopy(model))
    for net in (model, twin):
        net(torch.ones(2, 8)).sum().backward()
    torch.testing.assert_close(updater.gradient("0"), twin[0].weight.grad)


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:no weight is left")
@pytest.mark.parametrize("method", ["RigL", "GraNet", "SNFS", "RigLSG", "TopKAST"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast", "scaler", "clip"])
def test_ordinary_loops_report_nothing(method, kind):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = network().to(dtype)
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    updater = METHODS[method](model, opt)
    scaler = torch.amp.GradScaler("cpu", enabled=kind == "scaler", init_scale=2.0**12)
    for step in range(4):
        opt.zero_grad(set_to_none=bool(step % 2))
        for part in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind in ("autocast", "scaler")):
                value = model(batch(10 * step + part).to(dtype)).square().mean()
            scaler.scale(value).backward()
        if kind == "scaler":
            scaler.unscale_(opt)
        if kind in ("scaler", "clip"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if not updater.step():
            opt.step()
        scaler.update()


def test_hooks_are_gone_after_an_update():
    model = network()
    updater = METHODS["RigL"](model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        updater.optimizer.zero_grad()
        loss(model, step).backward()
        updater.step()
        assert not any(m.values._post_accumulate_grad_hooks for _, m in sparse_modules(model))


def factors() -> Iterator[tuple[Tensor, Tensor, float | None]]:
    one = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        yield one.to(dtype) * 0.37, one.to(dtype), 0.37
        yield one.to(dtype) / 65536, one.to(dtype), 1 / 65536
        yield one.to(dtype).abs(), one.to(dtype), None
    yield one * 1e-30 * 3, one * 1e-30, 3.0
    yield one[:0], one[:0], None
    yield one[:5], one, None


@pytest.mark.parametrize("case", list(factors()))
def test_multiples_are_told_from_other_changes(case):
    tensor, of, expected = case
    found = multiple(tensor, of)
    assert (found is None) if expected is None else found == pytest.approx(expected, rel=1e-2)


def test_a_convolution_that_runs_twice_and_is_zeroed_between():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SparseConv2d(4, 4, 3, padding=1, sparsity=0.5, seed=0).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    model = Twice()
    twin = densify(copy.deepcopy(model))
    updater = METHODS["RigL"](model, torch.optim.SGD(model.parameters(), lr=0.1))
    for net in (model, twin):
        for seed in range(3):
            net.zero_grad(set_to_none=False)
            net(batch(seed)).square().sum().backward()
        net(batch(7)).square().sum().backward()
    assert_gradients(updater, twin)
