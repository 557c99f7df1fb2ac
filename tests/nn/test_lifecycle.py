"""Sparse modules go wherever nn.Module goes: copies, dtypes, compilers, averages, optimizers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekd as skd
from sparsekd.errors import TopologyError
from sparsekd.nn import SparseConv2d, SparseLinear, sparse_modules


def network(seed: int = 0) -> nn.Sequential:
    return nn.Sequential(
        SparseConv2d(3, 8, 3, padding=1, sparsity=0.5, seed=seed),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        SparseConv2d(8, 8, 3, groups=2, dilation=2, sparsity=0.7, seed=seed + 1),
        nn.Flatten(),
        SparseLinear(8 * 16, 5, sparsity=0.8, seed=seed + 2),
    )


def batch() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def rolled(module) -> torch.Tensor:
    """Return another mask with the same number of ones."""
    return module.topology.mask().roll(1, dims=0)


def copies(model: nn.Module) -> dict[str, nn.Module]:
    return {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_equal_and_independent(way):
    model = network().eval()
    model[0].rewire(rolled(model[0]))
    twin = copies(model)[way]
    expected = model(batch())
    assert torch.equal(twin(batch()), expected)
    assert twin[0].topology == model[0].topology
    assert [m.topology.version for _, m in sparse_modules(twin)] == [1, 0, 0]
    twin[0].rewire(rolled(twin[0]))
    twin[3].rewire(torch.ones(twin[3].topology.shape, dtype=torch.bool))
    assert torch.equal(model(batch()), expected)
    assert [m.topology.version for _, m in sparse_modules(model)] == [1, 0, 0]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_copies_share_index_memory_with_their_topology(way):
    module = copies(copies(SparseLinear(8, 8))[way])[way]
    assert module.col_indices is module.topology.col_indices
    assert module.crow_indices is module.topology.crow_indices


def test_a_saved_module_loads(tmp_path):
    model = network().eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(batch()), model(batch()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_moves(dtype):
    model = network().eval()
    expected, topologies = model(batch()), [m.topology for _, m in sparse_modules(model)]
    values = model[0].values
    model.to(dtype)
    assert model[0].values is values
    assert model[0].crow_indices.dtype == torch.int32
    assert [m.topology for _, m in sparse_modules(model)] == topologies
    y = model(batch().to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.sum().backward()
    assert model[0].values.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = network()
    with torch.autocast("cpu", dtype=dtype):
        y = model(batch())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), model(batch()), rtol=0.1, atol=0.1)
    y.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_once_for_all_topologies_of_equal_length(backend):
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(batch()).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for _, module in sparse_modules(model):
                module.rewire(rolled(module))
                nn.init.normal_(module.values)
            model.zero_grad()
            y = compiled(batch())
            y.sum().backward()
            got = [parameter.grad.clone() for parameter in model.parameters()]
            model.zero_grad()
            expected = model(batch())
            expected.sum().backward()
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(got, [parameter.grad for parameter in model.parameters()])


@pytest.mark.parametrize("use_ema", [True, False])
def test_averaged_models(use_ema):
    model = network()
    average = AveragedModel(
        model, **({"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if use_ema else {})
    )
    oracle, shadow = copy.deepcopy(model), None
    for step in range(1, 4):
        with torch.no_grad():
            for _, module in sparse_modules(model):
                module.values.normal_()
        average.update_parameters(model)
        new = [m.dense_weight().detach() for _, m in sparse_modules(model)]
        weight = 1 if step == 1 else 0.1 if use_ema else 1 / step
        shadow = (
            new
            if shadow is None
            else [s + weight * (n - s) for s, n in zip(shadow, new, strict=True)]
        )
    for (_, module), (_, start), expected in zip(
        sparse_modules(average), sparse_modules(oracle), shadow, strict=True
    ):
        torch.testing.assert_close(module.dense_weight().detach(), expected)
        assert module.topology == start.topology
    assert average(batch()).isfinite().all()
    assert torch.equal(copy.deepcopy(average).eval()(batch()), average.eval()(batch()))


def test_an_averaged_model_follows_a_rewire():
    model = network()
    average = skd.optim.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    before = model[0].dense_weight().detach()
    model[0].rewire(rolled(model[0]))
    nn.init.ones_(model[0].values)
    average.update_parameters(model)
    assert average.module[0].topology == model[0].topology
    expected = (0.9 * before + 0.1) * model[0].topology.mask()
    torch.testing.assert_close(average.module[0].dense_weight().detach(), expected)
    pickle.loads(pickle.dumps(average.module))
    assert average.module[0].rewire(rolled(model[0])).old == model[0].topology


def test_damaged_buffers_are_noticed():
    linear = SparseLinear(8, 8, sparsity=0.5)
    linear.col_indices[0] = 99
    with pytest.raises(TopologyError, match="col_indices"):
        _ = linear.topology
    with pytest.raises(TopologyError, match="col_indices"):
        linear(torch.randn(2, 8))


def test_buffers_written_in_place_are_the_new_topology():
    linear = SparseLinear(8, 8, sparsity=0.5)
    wanted = SparseLinear(8, 8, sparsity=0.5, seed=1).topology
    linear.crow_indices.copy_(wanted.crow_indices)
    linear.col_indices.copy_(wanted.col_indices)
    with pytest.warns(RuntimeWarning, match="wrote other positions into its index buffers"):
        assert linear.topology == wanted
    assert linear.topology.version == 1
    assert linear.topology.version == 1


def test_functional_call():
    model, other = network().eval(), network(seed=5).eval()
    y = functional_call(model, other.state_dict(), (batch(),))
    assert torch.equal(y, other(batch()))
    values = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    grads = torch.autograd.grad(functional_call(other, values, (batch(),)).sum(), values.values())
    other(batch()).sum().backward()
    for grad, parameter in zip(grads, other.parameters(), strict=True):
        assert torch.equal(grad, parameter.grad)


def test_parameter_vectors():
    model, other = network().eval(), network().eval()
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert vector.numel() == sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(2 * vector, other.parameters())
    torch.testing.assert_close(other[5].values, 2 * model[5].values)
    other[5].rewire(rolled(other[5]))
    other(batch()).sum().backward()


def test_gradient_clipping():
    model = network()
    (1e3 * model(batch())).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm <= 1 + 1e-5
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    assert max(p.grad.abs().max() for p in model.parameters()) <= 1e-3 + 1e-9


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_optimizers_with_parameter_groups(name):
    model = network()
    groups = [
        {"params": [m.values for _, m in sparse_modules(model)], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if not n.endswith("values")]},
    ]
    optimizer = getattr(torch.optim, name)(groups, lr=1e-3)
    before = model[0].values.detach().clone()
    model(batch()).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].values, before)


def test_device_moves_keep_the_topology():
    linear = SparseLinear(8, 8, sparsity=0.5)
    linear.rewire(rolled(linear))
    topology = linear.topology
    assert linear.to("meta").topology is topology
    assert linear.to_empty(device="cpu").topology == topology
    assert linear.topology.version == 1
    assert linear.col_indices is linear.topology.col_indices


@pytest.mark.parametrize(
    "build", [lambda **k: SparseLinear(8, 6, **k), lambda **k: SparseConv2d(4, 6, 3, **k)]
)
def test_meta_construction(build):
    plain = build()
    meta = build(device="meta")
    with torch.device("meta"):
        context = build()
    for module in (meta, context):
        assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
        assert module.topology == plain.topology
    meta.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(meta.dense_weight(), plain.dense_weight())
    assert not any(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    context.to_empty(device="cpu")
    context.reset_parameters()
    assert context.topology == plain.topology
    assert context.values.abs().max() <= 1


def test_sparse_modules_are_listed_once_in_order():
    shared = SparseLinear(4, 4)
    model = nn.Sequential(
        nn.Linear(4, 4), shared, nn.Sequential(nn.ReLU(), shared, SparseLinear(4, 4))
    )
    assert [name for name, _ in sparse_modules(model)] == ["1", "2.2"]


def test_apply_and_repr_of_a_model():
    model = network()
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert "nnz=" in repr(model)
