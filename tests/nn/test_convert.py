"""sparsify and densify: what they convert, what they keep, what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsekd import models
from sparsekd.errors import ShapeError, TopologyError, UnsupportedError
from sparsekd.nn import (
    SparseConv2d,
    SparseLinear,
    densify,
    sparse_modules,
    sparsify,
    survey,
)
from sparsekd.nn.init import active_fans
from sparsekd.sparsity import allocate

pytestmark = pytest.mark.usefixtures("no_unexpected_warnings")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding="same", padding_mode="circular", bias=False),
        nn.BatchNorm2d(16),
        nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4, stride=2)),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    )


def batch() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def counts(model: nn.Module) -> dict[str, int]:
    return {name: module.topology.nnz for name, module in sparse_modules(model)}


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_total_is_exact_and_allocated_as_promised(distribution, criterion):
    model = network()
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if n in ("0", "2.1", "4")}
    returned = sparsify(model, 0.87, distribution, criterion)
    assert returned is model
    assert counts(model) == allocate(shapes, 0.87, distribution)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(counts(model).values()) == round((1 - 0.87) * total)


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_output_equals_the_masked_dense_model(criterion):
    model = network()
    masked = copy.deepcopy(model)
    sparsify(model, 0.7, criterion=criterion)
    with torch.no_grad():
        for name, module in sparse_modules(model):
            masked.get_submodule(name).weight.mul_(module.topology.mask())
    for training in (True, False):
        model.train(training)
        masked.train(training)
        torch.testing.assert_close(model(batch()), masked(batch()))


def test_magnitude_keeps_the_largest_of_each_layer():
    model = network()
    weight = model[4].weight.detach().clone().abs()
    sparsify(model, 0.8, criterion="magnitude")
    mask = model[4].topology.mask()
    assert weight[mask].min() >= weight[~mask].max()


def test_masks_depend_on_the_seed_only():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model = network()
    torch.set_rng_state(state)
    first = sparsify(copy.deepcopy(model), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = sparsify(copy.deepcopy(model), seed=1), sparsify(model, seed=2)
    for (_, a), (_, b), (_, c) in zip(*map(sparse_modules, (first, again, other)), strict=True):
        assert a.topology == b.topology
        assert torch.equal(a.values, b.values)
        assert a.topology != c.topology


def test_layers_of_one_shape_get_different_masks():
    model = sparsify(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)), 0.5, "uniform")
    assert model[0].topology != model[1].topology


def test_a_layer_that_the_distribution_makes_dense_is_sparse_with_a_full_mask():
    model = sparsify(models.lenet300_100(), 0.9)
    *_, (_, last) = sparse_modules(model)
    assert isinstance(last, SparseLinear)
    assert last.topology.density == 1


@pytest.mark.parametrize("build", [models.resnet20, models.wrn22_2, models.lenet5])
def test_networks_of_the_package(build):
    model = build()
    layers = len(survey(model).convertible)
    sparsify(model, 0.9)
    assert len(counts(model)) == layers > 0
    channels = next(m.in_channels for _, m in sparse_modules(model))
    y = model.eval()(
        torch.randn(2, channels, 32 if channels == 3 else 28, 32 if channels == 3 else 28)
    )
    assert y.shape == (2, 10)


def test_bias_mode_dtype_and_frozen_weights_stay():
    model = network().double().eval()
    model[4].weight.requires_grad_(False)
    bias = model[4].bias
    sparsify(model)
    assert model[4].bias is bias
    assert model[4].values.dtype == torch.float64
    assert not model[4].values.requires_grad
    assert not any(module.training for module in model.modules())
    densify(model)
    assert model[4].bias is bias
    assert not model[4].weight.requires_grad
    assert not any(module.training for module in model.modules())


def test_hooks_stay_and_their_handles_keep_working():
    model, calls = network(), []
    forward = model[4].register_forward_hook(lambda *_: calls.append("forward"))
    model[4].register_forward_pre_hook(lambda m, a, k: calls.append("pre"), with_kwargs=True)
    model[4].register_full_backward_hook(lambda *_: calls.append("backward"))
    sparsify(model)
    model(batch()).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    forward.remove()
    densify(model)
    model(batch()).sum().backward()
    assert calls == ["pre", "forward", "backward", "pre", "backward"]


def test_a_module_in_two_places_is_converted_once():
    shared = nn.Linear(8, 8)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = shared, nn.ModuleList([nn.ReLU(), shared])
            self.head = nn.Linear(8, 2)

    model = Twice()
    sparsify(model, 0.5, "uniform")
    assert isinstance(model.first, SparseLinear)
    assert model.rest[1] is model.first
    assert counts(model) == {"first": 32, "head": 8}
    densify(model)
    assert type(model.first) is nn.Linear
    assert model.rest[1] is model.first


def test_a_layer_itself_is_returned_converted():
    conv, linear = nn.Conv2d(4, 8, 3), nn.Linear(8, 4)
    sparse_conv, sparse_linear = sparsify(conv, 0.5), sparsify(linear, 0.5)
    assert isinstance(sparse_conv, SparseConv2d)
    assert isinstance(sparse_linear, SparseLinear)
    assert type(densify(sparse_conv)) is nn.Conv2d
    assert type(densify(sparse_linear)) is nn.Linear
    mask = torch.eye(4, 8, dtype=torch.bool)
    assert torch.equal(sparsify(linear, masks={"": mask}).topology.mask(), mask)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("4", {"0", "2.1"}),
        (("0", "4"), {"2.1"}),
        ("2", {"0", "4"}),
        ("2.*", {"0", "4"}),
        (["[04]"], {"2.1"}),
        ((), {"0", "2.1", "4"}),
    ],
)
def test_skip(skip, left):
    model = sparsify(network(), 0.5, skip=skip)
    assert set(counts(model)) == left
    dense = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    assert dense + sum(m.topology.numel for _, m in sparse_modules(model)) == 3 * 144 + 576 + 1440


@pytest.mark.parametrize("pattern", ["fc", "1", "3", "2.1.weight", "", "Linear"])
def test_a_pattern_that_matches_no_layer_is_refused(pattern):
    model = network()
    with pytest.raises(ValueError, match=r"skip: .* matches no layer; the layers are 0, 2\.1, 4"):
        sparsify(model, skip=["0", pattern])
    assert not counts(model)


def test_skip_by_any_name_of_a_shared_module():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    assert set(counts(sparsify(model, skip="b"))) == {"c"}


def test_given_masks():
    model = network()
    weight = model[2][1].weight.detach().clone()
    mask = torch.rand(weight.shape) < 0.2
    with pytest.warns(UserWarning, match="leaves these layers dense") as caught:
        sparsify(model, masks={"2.1": mask})
    lines = str(caught[0].message).split("\n")[1:]
    assert lines == [
        "  0: no mask was given for it (17.2%)",
        "  4: no mask was given for it (57.5%)",
    ]
    assert counts(model) == {"2.1": int(mask.sum())}
    assert torch.equal(model[2][1].dense_weight(), weight * mask)
    assert type(model[4]) is nn.Linear


@pytest.mark.parametrize(
    ("error", "text", "masks", "skip"),
    [
        (ValueError, "masks: '5' is no layer.*the layers are 0, 2.1, 4", {"5": (10, 144)}, ()),
        (ValueError, "masks: '1' is no layer", {"1": (16,)}, ()),
        (ValueError, "masks: '4' is no layer.*skipped", {"4": (10, 144)}, "4"),
        (
            ShapeError,
            r"masks\['4'\]: expected shape \[10, 144\], got \[144, 10\]",
            {"4": (144, 10)},
            (),
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused_and_nothing_is_converted(error, text, masks, skip):
    model = network()
    given = {name: torch.ones(shape, dtype=torch.bool) for name, shape in masks.items()}
    given = {"0": torch.ones(16, 3, 3, 3, dtype=torch.bool), **given}
    with pytest.raises(error, match=text):
        sparsify(model, masks=given, skip=skip)
    assert not counts(model)


def test_a_mask_that_is_not_bool_is_refused_and_nothing_is_converted():
    model = network()
    masks = {"0": torch.ones(16, 3, 3, 3, dtype=torch.bool), "4": torch.ones(10, 144)}
    with pytest.raises(TopologyError, match=r"torch\.bool"):
        sparsify(model, masks=masks)
    assert not counts(model)


def test_masks_for_two_names_of_one_module_must_agree():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    eye = torch.eye(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="one module"):
        sparsify(model, masks={"a": eye, "b": ~eye})
    assert counts(sparsify(model, masks={"b": eye, "a": eye.clone()})) == {"a": 4}


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoders_work_in_training_and_inference(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    sparsify(model, 0.5, skip="*.self_attn")
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        y = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], expected[~padding])


def test_init_keep_is_the_default_and_sparse_redraws_by_active_fan_in():
    model = nn.Sequential(nn.Linear(400, 100), nn.Linear(100, 10))
    weight = model[0].weight.detach().clone()
    kept, drawn = sparsify(copy.deepcopy(model), 0.95), sparsify(model, 0.95, init="sparse")
    assert torch.equal(kept[0].values, weight[kept[0].topology.mask()])
    assert kept[0].topology == drawn[0].topology
    fan_in, _ = active_fans(drawn[0].topology)
    assert (drawn[0].values.abs() <= 1 / fan_in.sqrt() + 1e-6).all()
    assert drawn[0].values.std() > 3 * kept[0].values.std()
    assert torch.equal(kept[0].bias, drawn[0].bias)


def test_densify_is_the_inverse_up_to_stored_zeros():
    model = sparsify(network(), 0.8)
    y = model.eval()(batch())
    weights = {name: module.dense_weight().detach() for name, module in sparse_modules(model)}
    keys = set(network().state_dict())
    assert densify(model) is model
    assert set(model.state_dict()) == keys
    assert repr(model) == repr(network())
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    torch.testing.assert_close(model(batch()), y)
    masks = {name: weight != 0 for name, weight in weights.items()}
    torch.testing.assert_close(sparsify(model, masks=masks)(batch()), y)


def test_densify_of_a_dense_model_changes_nothing():
    model = network()
    modules = list(model.modules())
    densify(model)
    assert list(model.modules()) == modules


def test_a_sparse_layer_in_the_model_stays_as_it_is():
    sparse = SparseLinear(8, 8)
    model = sparsify(nn.Sequential(sparse, nn.Linear(8, 8)), 0.5)
    assert model[0] is sparse
    assert counts(model) == {"0": 6, "1": 32}


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, "sparsity: expected", {"sparsity": 90}),
        (UnsupportedError, "distribution: expected one of uniform, er, erk", {"distribution": "x"}),
        (UnsupportedError, "criterion: expected one of random, magnitude", {"criterion": "snip"}),
        (
            UnsupportedError,
            "layout: expected one of csr, bcsr, fanin, nm, got 'coo'",
            {"layout": "coo"},
        ),
        (UnsupportedError, "init: expected one of keep, sparse", {"init": "kaiming"}),
    ],
)
def test_sparsify_refuses(error, text, arguments):
    model = network()
    with pytest.raises(error, match=text):
        sparsify(model, **arguments)
    assert not counts(model)


def test_nothing_to_convert_is_refused():
    with pytest.raises(ValueError, match="found none"):
        sparsify(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="all are skipped or left alone"):
        sparsify(nn.Sequential(nn.Linear(2, 2)), skip="*")
    with pytest.raises(ValueError, match="ParametrizedLinear"):
        sparsify(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
