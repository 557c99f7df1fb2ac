"""The dense gradient that growth looks at, and what collecting it costs elsewhere."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from sparsekd.dst import SET, RigL, Updater
from sparsekd.nn import SparseConv2d, SparseLinear, densify, sparse_modules
from sparsekd.ops import observe
from sparsekd.ops.growth import Block


def rigl(model: nn.Module, **arguments) -> RigL:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return RigL(model, optimizer, **({"every": 1, "until": 100} | arguments))


def gradients(dst: Updater) -> dict[str, Tensor]:
    return {name: dst.gradient(name) for name in dst.modules}


def assert_like_dense(dst: RigL, twin: nn.Module, tolerance: float = 1e-12) -> None:
    for name, gradient in gradients(dst).items():
        expected = twin.get_submodule(name).weight.grad
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            gradient, expected.view_as(gradient), rtol=0, atol=tolerance * scale, check_dtype=False
        )


CONVOLUTIONS = [
    {"padding": 1},
    {"padding": (2, 0), "stride": (2, 1), "groups": 2},
    {"padding": "same", "kernel_size": (2, 4), "dilation": (1, 2)},
    {"padding": 2, "padding_mode": "circular", "groups": 4},
    {"padding": (1, 2), "padding_mode": "reflect", "stride": 2},
    {"padding": "same", "padding_mode": "replicate", "kernel_size": 2},
]


@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_equals_dense_autograd_for_convolutions(geometry, layout):
    arguments = {"kernel_size": 3} | geometry
    model = nn.Sequential(SparseConv2d(4, 8, sparsity=0.6, seed=1, **arguments), nn.Tanh()).double()
    twin = densify(copy.deepcopy(model))
    dst = rigl(model)
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64).to(memory_format=layout)
    for net in (model, twin):
        net(x).square().sum().backward()
    assert_like_dense(dst, twin)


@pytest.mark.parametrize("shape", [(3, 7), (7,), (2, 3, 7), (0, 7)], ids=str)
def test_it_equals_dense_autograd_for_linear_layers(shape):
    model = SparseLinear(7, 5, sparsity=0.6, seed=1).double()
    twin = densify(copy.deepcopy(model))
    dst = rigl(model)
    x = torch.randn(shape, dtype=torch.float64)
    for net in (model, twin):
        net(x).square().sum().backward()
    torch.testing.assert_close(dst.gradient(""), twin.weight.grad, rtol=0, atol=1e-12)


def test_several_calls_and_several_backward_passes_add_up(make_network):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SparseLinear(6, 6, sparsity=0.5, seed=0).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    model = Twice()
    twin = densify(copy.deepcopy(model))
    dst = rigl(model)
    for _ in range(4):
        x = torch.randn(8, 6, dtype=torch.float64)
        for net in (model, twin):
            net(x).square().sum().backward()
    record = dst._gradients._records["layer"]
    assert record.size <= 4 * 8 * 6  # earlier passes have been summed, not kept
    assert_like_dense(dst, twin)


def test_zeroed_gradients_start_the_sum_afresh(make_network):
    model = make_network().eval()
    twin = densify(copy.deepcopy(model))
    dst = rigl(model)
    model(torch.randn(2, 4, 6, 6, dtype=torch.float64)).sum().backward()  # a batch given up
    dst.optimizer.zero_grad()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for net in (model, twin):
        net(x).square().sum().backward()
    assert_like_dense(dst, twin)


def test_a_gradient_of_the_input_alone_does_not_count(make_network):
    """Adversarial examples differentiate by the input within the iteration."""
    model = make_network().eval()
    twin = densify(copy.deepcopy(model))
    dst = rigl(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    (direction,) = torch.autograd.grad(model(x).square().sum(), x)
    x = (x + 0.1 * direction.sign()).detach()
    for net in (model, twin):
        net(x).square().sum().backward()
    assert_like_dense(dst, twin)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(make_network, reentrant):
    model = make_network().eval()
    twin = densify(copy.deepcopy(model))
    dst = rigl(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    y.square().sum().backward()
    twin(x).square().sum().backward()
    assert_like_dense(dst, twin)


def test_a_gradient_penalty_counts(make_network):
    """Double backward: the penalty's own gradient is part of the weight's."""
    model = nn.Sequential(
        SparseConv2d(4, 6, 3, sparsity=0.5, seed=0), nn.Tanh(), nn.Flatten(),
        SparseLinear(96, 3, sparsity=0.5, seed=1),
    ).double()  # fmt: skip
    twin = densify(copy.deepcopy(model))
    dst = rigl(model)
    for net in (model, twin):
        x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).double()
        x.requires_grad_()
        (gx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        gx.square().sum().backward()
    assert_like_dense(dst, twin)


def test_autocast_scores_are_float32(make_network):
    model = make_network(dtype=torch.float32)
    twin = densify(copy.deepcopy(model))
    dst = rigl(model)
    x = torch.randn(3, 4, 6, 6)
    for net in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x).square().sum()
        loss.backward()
    found = gradients(dst)
    assert {g.dtype for g in found.values()} == {torch.float32}
    last = twin[6].weight.grad
    # bfloat16 keeps 8 bits; a sum of 3 products of rounded factors errs by a few of the last
    torch.testing.assert_close(found["6"], last, rtol=0, atol=2**-5 * last.abs().max().item())


def test_forwards_without_a_backward_leave_nothing(make_network):
    model = make_network()
    dst = rigl(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert len(dst._gradients) == 0


def test_without_a_backward_pass_the_update_is_an_error(make_network):
    dst = rigl(make_network())
    with pytest.raises(RuntimeError, match=r"RigL grows by gradient.*backward"):
        dst.step()


def test_a_layer_outside_the_backward_pass_stays(make_network):
    model = nn.ModuleDict({n: SparseLinear(6, 4, sparsity=0.5, seed=0) for n in ("used", "spare")})
    dst = rigl(model)
    before = model["spare"].topology
    model["used"](torch.randn(2, 6)).square().sum().backward()
    assert dst.step()
    assert set(dst.last_update) == {"used"}
    assert model["spare"].topology is before


def test_operands_are_kept_on_update_iterations_only(make_network):
    model = make_network()
    dst = rigl(model, every=3, until=8)
    collected = []
    for _ in range(10):
        dst.optimizer.zero_grad()
        model(torch.randn(2, 4, 6, 6, dtype=torch.float64)).square().sum().backward()
        collected.append(len(dst._gradients))
        dst.step()
        assert len(dst._gradients) == 0
    assert collected == [0, 0, 3, 0, 0, 3, 0, 0, 0, 0]


def test_set_nevercollects(make_network):
    model = make_network()
    dst = SET(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1, until=100)
    assert dst._gradients not in observe.listeners


def test_no_dense_gradient_of_a_layer_is_ever_stored(make_network, monkeypatch):
    model = nn.Sequential(*(SparseLinear(64, 64, sparsity=0.5, seed=s) for s in range(2)))
    dst = rigl(model)
    monkeypatch.setattr(dst, "gradient", None)
    shapes: list[torch.Size] = []
    original = dst.gradient_blocks

    def watched(name: str) -> Iterator[Block]:
        for row, col, block in original(name):
            shapes.append(block.shape)
            yield row, col, block

    monkeypatch.setattr(dst, "gradient_blocks", watched)
    model(torch.randn(2, 64)).square().sum().backward()
    assert dst.step()
    assert shapes == [(64, 32)] * 4  # halves, as the layers are small


def test_the_operands_are_not_copied(make_network):
    model = make_network()
    dst = rigl(model)
    grads = []
    model[3].register_full_backward_hook(lambda module, gx, gy: grads.append(gy[0].data_ptr()))
    model(torch.randn(2, 4, 6, 6, dtype=torch.float64)).square().sum().backward()
    ((grad, _, _),) = dst._gradients._records["3"].operands
    assert [grad.tensor.data_ptr()] == grads


def test_a_batch_that_is_overwritten_after_the_backward_pass_does_no_harm(make_network):
    """A loader may fill one buffer again and again, here within gradient accumulation."""
    model = make_network().eval()
    twin = densify(copy.deepcopy(model))
    dst = rigl(model)
    batch = torch.empty(2, 4, 6, 6, dtype=torch.float64)
    for _ in range(3):
        batch.normal_()
        for net in (model, twin):
            net(batch).square().sum().backward()
    batch.zero_()
    assert_like_dense(dst, twin)


def test_an_operand_that_is_overwritten_is_found_out(make_network):
    """An activation that the user kept and wrote to, between backward and step."""
    layers = [SparseLinear(6, 6, sparsity=0.5, seed=s) for s in range(2)]
    dst = rigl(nn.ModuleList(layers))
    hidden = layers[0](torch.randn(2, 6))
    layers[1](hidden).square().sum().backward()
    with torch.no_grad():
        hidden.zero_()
    with pytest.raises(RuntimeError, match="modified in place after the backward pass"):
        dst.step()


def test_an_updater_that_is_gone_listens_no_more(make_network):
    model = make_network()
    dst = rigl(model)
    assert dst._gradients in observe.listeners
    capture = weakref.ref(dst._gradients)
    del dst
    gc.collect()
    assert capture() is None


def test_two_models_do_not_mix(make_network):
    student, other = make_network(0), make_network(0)
    twin = densify(copy.deepcopy(student))
    dst = rigl(student)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    other(x).sum().backward()
    for net in (student, twin):
        net(x).square().sum().backward()
    other(x).sum().backward()
    assert_like_dense(dst, twin)


@pytest.mark.slow
def test_a_compiled_model_is_rewired_like_an_eager_one(make_network):
    """Updates come after compilation, and no rewire at equal nnz compiles anew."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = make_network()
        forward = model
        if compiled:
            forward = torch.compile(model, fullgraph=True, backend="aot_eager")
        dst = rigl(model, every=3, until=100)
        rewired = []
        for t in range(10):
            x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(t)).double()
            dst.optimizer.zero_grad()
            forward(x).square().mean().backward()
            rewired.append(dst.step())
            if not rewired[-1]:
                dst.optimizer.step()
        assert rewired == [False, False, True] * 3 + [False]
        if compiled:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        results.append({n: (m.topology, m.dense_weight()) for n, m in sparse_modules(model)})
    for name, (topology, weight) in results[0].items():
        assert topology == results[1][name][0]
        torch.testing.assert_close(weight, results[1][name][1], rtol=0, atol=1e-12)


def test_a_gradient_op_outside_a_backward_pass_does_not_count():
    """Measuring or testing the kernels on a model's structure is no training."""
    layer = SparseLinear(6, 4, sparsity=0.5, seed=0)
    dst = rigl(layer)
    torch.ops.sparsekd.linear_wgrad(
        torch.ones(2, 4), torch.ones(2, 6), layer.crow_indices, layer.col_indices, [4, 6]
    )
    assert len(dst._gradients) == 0
