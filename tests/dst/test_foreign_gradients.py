"""What growth says of a `.grad` that backward passes alone have not written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.utils.checkpoint
from gradient_loops import METHODS, accumulate, batch, loss, network, run
from torch import Tensor

from sparsekd.dst.passes import multiple
from sparsekd.nn import sparse_modules


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
