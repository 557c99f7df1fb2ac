"""Topology is valid by construction, stays what it was, and says where weights went."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd import Topology, TopologyDelta, csr
from sparsekd.errors import ShapeError, TopologyError

SHAPES = st.one_of(
    st.tuples(st.integers(0, 6), st.integers(0, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
)


@st.composite
def masks(draw: st.DrawFn, count: int = 1) -> list[torch.Tensor]:
    shape = draw(SHAPES)
    numel = torch.Size(shape).numel()
    bits = st.lists(st.booleans(), min_size=numel, max_size=numel)
    return [torch.tensor(draw(bits), dtype=torch.bool).reshape(shape) for _ in range(count)]


@given(masks())
def test_mask_round_trip(drawn: list[torch.Tensor]) -> None:
    (mask,) = drawn
    topology = Topology.from_mask(mask)
    assert torch.equal(topology.mask(), mask)
    assert topology.shape == mask.shape
    assert topology.nnz == int(mask.sum())
    assert topology.numel == mask.numel() == topology.rows * topology.cols
    assert topology.density + topology.sparsity == 1
    assert torch.equal(topology.flat_indices(), mask.flatten().nonzero().squeeze(1))
    assert topology.crow_indices.dtype == topology.col_indices.dtype == torch.int32
    rebuilt = Topology(topology.crow_indices, topology.col_indices, mask.shape)
    assert rebuilt == topology
    assert hash(rebuilt) == hash(topology)


@given(masks())
def test_transpose_is_the_structure_of_the_transposed_matrix(drawn: list[torch.Tensor]) -> None:
    (mask,) = drawn
    topology = Topology.from_mask(mask)
    transposed = topology.transpose()
    matrix = mask.reshape(topology.rows, topology.cols)
    expected = Topology.from_mask(matrix.T)
    assert torch.equal(transposed.crow_indices, expected.crow_indices)
    assert torch.equal(transposed.col_indices, expected.col_indices)
    flat = topology.flat_indices()[transposed.permutation.long()]
    rows, cols = expected.flat_indices() % topology.rows, expected.flat_indices() // topology.rows
    assert torch.equal(flat, rows * topology.cols + cols) or topology.nnz == 0
    assert topology.transpose() is transposed


@given(masks(2))
def test_rewire_says_where_each_weight_went(drawn: list[torch.Tensor]) -> None:
    before, after = drawn
    old = Topology.from_mask(before, version=3)
    new, delta = old.rewire(after)
    assert torch.equal(new.mask(), after)
    assert (old.version, new.version) == (3, 4)
    assert delta.old is old
    assert delta.new is new
    values = torch.arange(1.0, old.nnz + 1)
    dense = torch.zeros(before.shape)
    dense[before] = values
    assert torch.equal(delta.carry(values), dense[after])
    filled = delta.carry(values, fill=-1)
    assert torch.equal(filled == -1, delta.grown)
    assert torch.equal(delta.grown, ~before[after])
    assert torch.equal(delta.dropped, (~after[before]).nonzero().squeeze(1))
    assert int(delta.grown.sum()) - len(delta.dropped) == new.nnz - old.nnz


@given(masks(3))
@settings(max_examples=50)
def test_rewires_compose(drawn: list[torch.Tensor]) -> None:
    first, second, third = drawn
    topology = Topology.from_mask(first)
    values = torch.arange(1.0, topology.nnz + 1)
    middle, there = topology.rewire(second)
    _, back = middle.rewire(third)
    dense = torch.zeros(first.shape)
    dense[first] = values
    assert torch.equal(back.carry(there.carry(values)), (dense * second)[third])


GOOD = ([0, 2, 2, 3], [0, 3, 1], (3, 4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_accepts_both_index_types(dtype: torch.dtype) -> None:
    crow, col, shape = GOOD
    topology = Topology(torch.tensor(crow, dtype=dtype), torch.tensor(col, dtype=dtype), shape)
    assert topology.flat_indices().tolist() == [0, 3, 9]


@pytest.mark.parametrize(
    "crow, col, shape, message",
    [
        ([0, 2, 3], [0, 3, 1], (3, 4), "crow_indices: expected length .* = 4, got 3"),
        ([1, 2, 2, 3], [0, 3, 1], (3, 4), "crow_indices: expected to start at 0, got 1"),
        ([0, 2, 2, 4], [0, 3, 1], (3, 4), "crow_indices: expected to end at nnz = 3"),
        ([0, 3, 2, 3], [0, 3, 1], (3, 4), "crow_indices: not monotone.*row 1"),
        ([0, 2**40, 2, 3], [0, 3, 1], (3, 4), "crow_indices: not monotone"),
        ([0, -1, 2, 3], [0, 3, 1], (3, 4), "crow_indices: not monotone"),
        ([0, 2, 2, 3], [0, 4, 1], (3, 4), "col_indices: out of range.*got 4 at position 1"),
        ([0, 2, 2, 3], [0, 3, -1], (3, 4), "col_indices: out of range.*got -1 at position 2"),
        ([0, 2, 2, 3], [0, 2**32, 1], (3, 4), "col_indices: out of range"),
        ([0, 2, 2, 3], [3, 0, 1], (3, 4), "col_indices: not sorted within row 0"),
        ([0, 2, 2, 3], [3, 3, 1], (3, 4), "col_indices: duplicated within row 0.*position 1"),
        ([0.0, 2, 2, 3], [0, 3, 1], (3, 4), "crow_indices: expected dtype int32 or int64"),
        ([0, 2, 2, 3], [0.0, 3, 1], (3, 4), "col_indices: expected dtype int32 or int64"),
        ([[0, 2, 2, 3]], [0, 3, 1], (3, 4), "crow_indices: expected one dimension"),
        ([0, 2, 2, 3], [[0, 3, 1]], (3, 4), "col_indices: expected one dimension"),
        ([0, 2, 2, 3], [0, 3, 1], (3,), "shape: expected two or more dimensions"),
        ([0, 2, 2, 3], [0, 3, 1], (3, -4), "shape: expected two or more dimensions"),
        ([0, 2, 2, 3], [0, 3, 1], (3, 2**30), "shape: .* too many for int32"),
    ],
)
def test_refuses_what_is_not_a_structure(crow, col, shape, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology(torch.tensor(crow), torch.tensor(col), shape)


def test_refuses_a_matrix_without_rows_and_row_pointers() -> None:
    nothing = torch.empty(0, dtype=torch.int32)
    with pytest.raises(TopologyError, match="crow_indices: expected length"):
        Topology(nothing, nothing, (0, 4))


def test_refuses_too_many_elements_in_a_mask() -> None:
    mask = torch.zeros(1, dtype=torch.bool).expand(2**16, 2**15)
    with pytest.raises(TopologyError, match="too many for int32"):
        Topology.from_mask(mask)


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(4, dtype=torch.bool)])
def test_refuses_what_is_not_a_mask(mask: torch.Tensor) -> None:
    with pytest.raises(TopologyError, match=r"mask: expected dtype torch\.bool|shape: expected"):
        Topology.from_mask(mask)


def test_rewire_refuses_another_shape() -> None:
    topology = Topology.from_mask(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"mask: expected shape \(2, 3\), got \(3, 2\)"):
        topology.rewire(torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TopologyError, match="mask: expected dtype"):
        topology.rewire(torch.ones(2, 3))


@pytest.mark.parametrize("size", [(2,), (4,), (3, 1), ()])
def test_carry_refuses_another_length(size: tuple[int, ...]) -> None:
    _, delta = Topology.from_mask(torch.eye(3, dtype=torch.bool)).rewire(
        torch.ones(3, 3, dtype=torch.bool)
    )
    with pytest.raises(ShapeError, match=r"tensor: expected shape \[3\]"):
        delta.carry(torch.zeros(size))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_carry_keeps_the_dtype(dtype: torch.dtype) -> None:
    _, delta = Topology.from_mask(torch.eye(3, dtype=torch.bool)).rewire(
        torch.ones(3, 3, dtype=torch.bool)
    )
    carried = delta.carry(torch.ones(3, dtype=dtype))
    assert carried.dtype == dtype
    assert carried.double().sum() == 3


def test_equality_ignores_version_but_not_shape() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    topology = Topology.from_mask(mask)
    later, _ = topology.rewire(mask)
    assert later == topology
    assert len({later, topology}) == 1
    assert topology != Topology.from_mask(mask.view(4, 2, 2))
    assert topology != Topology.from_mask(~mask)
    assert topology != "topology"


def copies(topology: Topology) -> dict[str, Topology]:
    buffer = io.BytesIO()
    torch.save(topology, buffer)
    buffer.seek(0)
    return {
        "pickle": pickle.loads(pickle.dumps(topology)),
        "deepcopy": copy.deepcopy(topology),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_are_equal_and_independent(how: str) -> None:
    topology = Topology.from_mask(torch.rand(5, 4, 3, 3) < 0.3, version=7)
    mask = topology.mask()
    twin = copies(topology)[how]
    assert twin == topology
    assert hash(twin) == hash(topology)
    assert twin.version == 7
    twin.crow_indices.zero_()
    assert torch.equal(topology.mask(), mask)


def test_copies_keep_sharing_with_the_module_around() -> None:
    topology = Topology.from_mask(torch.eye(3, dtype=torch.bool))
    holder = {"topology": topology, "buffer": topology.crow_indices}
    twin = copy.deepcopy(holder)
    assert twin["topology"].crow_indices is twin["buffer"]
    assert copy.copy(topology) is topology


def test_a_crafted_pickle_is_refused() -> None:
    topology = Topology.from_mask(torch.eye(3, dtype=torch.bool))
    rebuild, (crow, col, shape, version) = topology.__reduce__()
    with pytest.raises(TopologyError, match="out of range"):
        rebuild(crow, col + 7, shape, version)


def test_a_pickle_of_other_integers_is_made_one_of_ours() -> None:
    plain = Topology.from_mask(torch.rand(5, 9) < 0.4)
    adopt, (crow, col, *rest) = plain.__reduce__()
    adopted = adopt(crow.long(), col.repeat_interleave(2)[::2], *rest)
    assert adopted == plain
    assert adopted.crow_indices.dtype == torch.int32
    assert adopted.col_indices.is_contiguous()
    assert all(map(torch.equal, adopted.transpose(), plain.transpose()))


def test_arguments_are_copied() -> None:
    crow, col, shape = GOOD
    crow_indices, col_indices = torch.tensor(crow).int(), torch.tensor(col).int()
    topology = Topology(crow_indices, col_indices, shape)
    col_indices.fill_(9)
    crow_indices.fill_(-1)
    assert topology.flat_indices().tolist() == [0, 3, 9]


@pytest.mark.parametrize(
    "use",
    [
        Topology.mask,
        Topology.flat_indices,
        Topology.transpose,
        hash,
        lambda topology: topology == Topology.from_mask(torch.ones(3, 4, dtype=torch.bool)),
        lambda topology: topology.rewire(torch.ones(3, 4, dtype=torch.bool)),
        pickle.dumps,
    ],
)
@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
def test_a_modified_topology_is_refused(use, name: str) -> None:
    crow, col, shape = GOOD
    topology = Topology(torch.tensor(crow), torch.tensor(col), shape)
    hash(topology)
    getattr(topology, name).add_(1)
    with pytest.raises(TopologyError, match="modified in place"):
        use(topology)


def test_works_under_inference_mode() -> None:
    with torch.inference_mode():
        topology = Topology.from_mask(torch.eye(3, dtype=torch.bool))
        new, delta = topology.rewire(torch.ones(3, 3, dtype=torch.bool))
        assert delta.carry(torch.ones(3)).sum() == 3
        assert Topology(new.crow_indices, new.col_indices, (3, 3)) == new
    assert isinstance(topology.rewire(topology.mask())[1], TopologyDelta)


def test_forgets_its_kernel_plan_when_collected() -> None:
    core = pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    from sparsekd import functional

    topology = Topology.from_mask(torch.eye(6, 5, dtype=torch.bool))
    functional.linear(topology, torch.ones(topology.nnz), torch.ones(5))
    gc.collect()
    # Counted only around the drop: a new structure may take dead ones of other tests along.
    kept = core.info()["cached_structures"]
    del topology
    gc.collect()
    assert core.info()["cached_structures"] == kept - 1


def test_moves_between_devices() -> None:
    topology = Topology.from_mask(torch.eye(3, dtype=torch.bool))
    assert topology.to("cpu") is topology
    assert topology.device == torch.device("cpu")


@pytest.mark.parametrize("change", ["rounded", "swapped", "moved", "shifted"])
def test_checksums_tell_changed_indices(change):
    """The one of the CPU, and that of devices, computed here on the CPU."""
    generator = torch.Generator().manual_seed(0)
    topology = Topology.from_mask(torch.rand(30, 40, generator=generator) < 0.1)
    crow, col = topology.crow_indices.clone(), topology.col_indices.clone()
    if change == "rounded":
        col[int(col.argmax())] -= 1
    elif change == "swapped":
        col[:2] = col[:2].flip(0)
    elif change == "moved":
        crow[5] += 1
    else:
        col.copy_(col.roll(1))
    for checksum in (csr.checksum, lambda crow, col: csr._mixed(crow) * 3 + csr._mixed(col)):
        before = checksum(topology.crow_indices, topology.col_indices)
        assert before == checksum(topology.crow_indices.clone(), topology.col_indices.clone())
        assert before != checksum(crow, col)


def test_between_any_two_topologies():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(5, 3, 2, generator=generator) < p for p in (0, 0.3, 0.6, 1)]
    for before, after in itertools.product(masks, masks):
        old = Topology.from_mask(before)
        expected = old.rewire(after)[1]
        delta = TopologyDelta.between(old, Topology.from_mask(after, version=7))
        assert torch.equal(delta.source, expected.source)
        assert (delta.old is old, delta.new.version) == (True, 7)
    with pytest.raises(ShapeError, match=r"new: expected shape \(5, 3, 2\)"):
        TopologyDelta.between(old, Topology.from_mask(masks[0][:4]))


def test_writing_what_is_there_already_is_no_modification():
    topology = Topology.from_mask(torch.eye(3, dtype=torch.bool))
    topology.col_indices.copy_(topology.col_indices.clone())
    assert topology.written
    assert topology.mask().equal(torch.eye(3, dtype=torch.bool))
    assert not topology.written
    topology.col_indices[0] = 1
    assert not topology.accept_if_equal()
