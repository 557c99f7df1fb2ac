"""Checkpoints: any topology, dense ones too, and nothing damaged gets in."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from sparsekd.errors import TopologyError
from sparsekd.nn import SparseConv2d, SparseLinear

KEYS = ["values", "bias", "crow_indices", "col_indices"]


def conv(sparsity: float = 0.8, seed: int = 0, **options) -> SparseConv2d:
    return SparseConv2d(4, 6, 3, groups=2, sparsity=sparsity, seed=seed, **options)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert list(module.state_dict()) == list(state)
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_state_dict_holds_values_and_indices():
    state = conv().state_dict()
    assert list(state) == KEYS
    assert list(conv(bias=False).state_dict()) == ["values", *KEYS[2:]]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("sparsity", [0.8, 0.3, 0.0, 1.0])
def test_loads_strictly_into_any_topology(sparsity, assign):
    source, target = conv(0.8, seed=1), conv(sparsity, seed=2)
    parameter, x = target.values, torch.randn(2, 4, 5, 5)
    target(x).sum().backward()
    result = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert target.topology == source.topology
    assert torch.equal(target.values, source.values)
    assert torch.equal(target(x), source(x))
    assert (target.values is parameter) is not assign
    target.values.grad = None
    target(x).sum().backward()
    assert target.values.grad.shape == (source.topology.nnz,)


def test_a_loaded_module_shares_nothing_with_the_checkpoint():
    source, target = conv(seed=1), conv(seed=2)
    state = source.state_dict()
    target.load_state_dict(state)
    target.rewire(torch.ones(target.topology.shape, dtype=torch.bool))
    with torch.no_grad():
        target.values.zero_()
    assert source.topology.nnz < target.topology.nnz
    assert source.values.any()


def test_an_earlier_state_dict_stays_consistent():
    module = conv(seed=1)
    state, expected = module.state_dict(), module.dense_weight().detach()
    module.rewire(module.topology.mask().roll(1, dims=0))
    module.load_state_dict(conv(seed=2).state_dict())
    fresh = conv(seed=3)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.dense_weight(), expected)


def test_loading_another_topology_counts_as_a_rewire_and_the_same_one_does_not():
    target = conv(seed=2)
    target.load_state_dict(conv(seed=2).state_dict())
    assert target.topology.version == 0
    target.load_state_dict(conv(seed=3).state_dict())
    assert target.topology.version == 1


def test_round_trip_through_a_safe_load():
    model = nn.Sequential(conv(seed=1), nn.BatchNorm2d(6), nn.Flatten(), SparseLinear(54, 3))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = nn.Sequential(conv(0.5), nn.BatchNorm2d(6), nn.Flatten(), SparseLinear(54, 3, seed=9))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_int64_indices_and_another_dtype_load():
    source = conv(seed=1, dtype=torch.float64)
    state = {k: v.long() if "indices" in k else v for k, v in source.state_dict().items()}
    target = conv(seed=2)
    target.load_state_dict(state)
    assert target.crow_indices.dtype == torch.int32
    assert target.values.dtype == torch.float32
    assert torch.equal(target.values, source.values.float())


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_checkpoint_is_projected_on_the_current_topology(assign):
    dense, target = nn.Conv2d(4, 6, 3, groups=2), conv(seed=2)
    topology = target.topology
    target.load_state_dict(dense.state_dict(), strict=True, assign=assign)
    assert target.topology is topology
    assert torch.equal(target.values, dense.weight[topology.mask()])
    assert torch.equal(target.bias, dense.bias)


def test_a_whole_dense_model_loads():
    def build(layer):
        return nn.Sequential(nn.Sequential(layer, nn.ReLU()), nn.Linear(6, 2))

    dense, target = build(nn.Linear(8, 6)), build(SparseLinear(8, 6))
    target.load_state_dict(dense.state_dict())
    assert torch.equal(
        target[0][0].dense_weight(), dense[0][0].weight * target[0][0].topology.mask()
    )


DAMAGE = {
    "column out of range": ("col_indices", 0, 18, "out of range"),
    "negative column": ("col_indices", 0, -1, "out of range"),
    "duplicated column": ("col_indices", 1, None, "duplicated"),
    "row pointer falls": ("crow_indices", 1, 10**6, "not monotone"),
    "wrong end": ("crow_indices", -1, 3, "expected to end at nnz"),
    "wrong start": ("crow_indices", 0, 1, "expected to start at 0"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_indices_are_refused_and_nothing_is_loaded(damage, assign):
    key, position, value, text = DAMAGE[damage]
    state, target = snapshot(conv(0.3, seed=1)), conv(seed=2)
    before = snapshot(target)
    state[key][position] = state[key][position - 1] if value is None else value
    with pytest.raises(TopologyError, match=rf"{key}: .*{text}"):
        target.load_state_dict(state, assign=assign)
    assert_same(target, before)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("crow_indices", torch.zeros(3, dtype=torch.int32)),
        ("col_indices", torch.zeros(3)),
        ("col_indices", torch.zeros(2, 2, dtype=torch.int32)),
        ("values", torch.zeros(5)),
        ("values", torch.zeros(2, 2)),
    ],
)
def test_tensors_of_the_wrong_kind_are_refused(key, tensor):
    target = nn.Sequential(conv(seed=2))
    before = snapshot(target)
    with pytest.raises(TopologyError, match=rf"0\.{key}: expected"):
        target.load_state_dict(
            {**conv(seed=1, sparsity=0.3).state_dict(prefix="0."), f"0.{key}": tensor}
        )
    assert_same(target, before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "state",
    [
        {**conv(seed=1).state_dict(), "bias": torch.zeros(7)},
        {**nn.Conv2d(4, 6, 3, groups=2).state_dict(), "bias": torch.zeros(7)},
        {"weight": torch.zeros(6, 4, 3, 3), "bias": torch.zeros(6)},
    ],
)
def test_shapes_that_do_not_fit_load_nothing(state, strict):
    target = conv(seed=2)
    before = snapshot(target)
    with pytest.raises(RuntimeError, match="size mismatch"):
        target.load_state_dict(state, strict=strict)
    assert_same(target, before)


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state as safetensors gives it back: without metadata."""
    return dict(state)


def saved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("keep", [plain, saved])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("layout", ["csr", "bcsr"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_another_number_of_classes_is_torchs_size_mismatch(kind, layout, assign, strict, keep):
    def build(rows: int) -> nn.Module:
        if kind == "linear":
            head: nn.Module = SparseLinear(32, rows, sparsity=0.5, layout=layout)
        else:
            head = SparseConv2d(32, rows, 3, sparsity=0.5, layout=layout)
        return nn.ModuleDict({"fc": head, "norm": nn.BatchNorm1d(3)})

    target, source = build(32), build(48)
    source["norm"].weight.data.fill_(7)
    before = snapshot(target["fc"])
    with pytest.raises(RuntimeError, match=r"mismatch for fc\.values: copying") as found:
        target.load_state_dict(keep(source.state_dict()), strict=strict, assign=assign)
    assert type(found.value) is RuntimeError
    text = str(found.value)
    assert (
        "size mismatch for fc.bias: copying a param with shape torch.Size([48]) from checkpoint, "
        "the shape in current model is torch.Size([32])." in text
    )
    assert "size mismatch for fc.crow_indices" in text
    assert ("size mismatch for fc.weight" in text) is (keep is saved)
    assert "Missing" not in text
    assert "Unexpected" not in text
    assert_same(target["fc"], before)
    assert bool((target["norm"].weight == 7).all())  # as torch: what fits is loaded


@pytest.mark.parametrize("columns", [6, 12])
@pytest.mark.parametrize("strict", [True, False])
def test_another_number_of_inputs_is_a_size_mismatch_where_the_checkpoint_tells(columns, strict):
    target, source = SparseLinear(8, 4, sparsity=0.5), SparseLinear(columns, 4, sparsity=0.5)
    before = snapshot(target)
    text = rf"size mismatch for weight: .*\[4, {columns}\].*\[4, 8\]"
    with pytest.raises(RuntimeError, match=text):
        target.load_state_dict(saved(source.state_dict()), strict=strict)
    assert_same(target, before)


def test_a_kernel_of_another_form_with_as_many_weights_is_a_size_mismatch():
    source, target = SparseConv2d(4, 6, (1, 3), sparsity=0.5), SparseConv2d(4, 6, (3, 1))
    with pytest.raises(
        RuntimeError, match=r"mismatch for weight: .*\[6, 4, 1, 3\].*\[6, 4, 3, 1\]"
    ):
        target.load_state_dict(source.state_dict())


def test_damaged_metadata_changes_nothing():
    source, target = conv(seed=1), conv(seed=2)
    for shape in ("x", [None], 3, None):
        state = source.state_dict()
        state._metadata[""]["weight_shape"] = shape
        target.load_state_dict(state)
        assert target.topology == source.topology


@pytest.mark.parametrize("gone", ["crow_indices", "col_indices"])
def test_values_with_half_of_their_indices_are_not_loaded(gone):
    state, target = conv(seed=1).state_dict(), conv(seed=2)
    del state[gone]
    before = snapshot(target)
    with pytest.raises(RuntimeError, match=f"values: cannot be placed, as {gone} is missing"):
        target.load_state_dict(state, strict=False)
    assert_same(target, before)


def test_damaged_indices_of_another_size_are_no_size_mismatch():
    state, target = snapshot(conv(seed=1)), SparseConv2d(4, 8, 3, groups=2)
    state["col_indices"][1] = state["col_indices"][0]
    with pytest.raises(TopologyError, match="crow_indices: expected length"):
        target.load_state_dict(state)


@pytest.mark.parametrize("gone", KEYS)
def test_missing_keys_are_named(gone):
    state = conv(seed=1).state_dict()
    del state[gone]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{gone}"'):
        conv(seed=2).load_state_dict(state)


def test_unexpected_keys_are_named():
    state = {**conv(seed=1).state_dict(), "wieght": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"wieght"'):
        conv(seed=2).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        conv(seed=2).load_state_dict({**conv().state_dict(), "weight": torch.zeros(6, 2, 3, 3)})


def test_values_alone_load_where_the_length_agrees_and_strict_is_off():
    target = conv(seed=2)
    topology = target.topology
    target.load_state_dict({"values": torch.ones(topology.nnz)}, strict=False)
    assert bool((target.values == 1).all())
    assert target.topology is topology
    with pytest.raises(RuntimeError, match="size mismatch"):
        target.load_state_dict({"values": torch.ones(topology.nnz + 1)}, strict=False)


def test_a_subclass_keeps_its_own_state():
    class Scaled(SparseLinear):
        def __init__(self, seed: int) -> None:
            super().__init__(6, 5, seed=seed)
            self.register_buffer("scale", torch.full((1,), float(seed)))
            self.norm = nn.LayerNorm(5)

    source, target = Scaled(3), Scaled(4)
    target.load_state_dict(source.state_dict())
    assert target.scale == 3
    assert target.topology == source.topology


def test_optimizer_continues_after_a_load_of_equal_length():
    source, target = conv(seed=1), conv(seed=2)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    target.load_state_dict(source.state_dict())
    target(torch.randn(2, 4, 5, 5)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(target.values, source.values - 0.1 * target.values.grad)
