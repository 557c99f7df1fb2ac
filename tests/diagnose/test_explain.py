"""What explain says of a model, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import sparsekd as skd
from sparsekd._torch import onednn_computes
from sparsekd.diagnose.breakeven import PassTimes, _line, _with_density, time_pass
from sparsekd.errors import ShapeError
from sparsekd.nn import SparseConv2d, SparseLinear
from sparsekd.ops import observe


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SPARSEKD_BACKEND", raising=False)
    return


def network() -> nn.Sequential:
    shared = SparseConv2d(8, 8, 3, padding=1, sparsity=0.8, seed=1)
    return nn.Sequential(
        SparseConv2d(3, 8, 3, padding=1, sparsity=0.5, seed=0),
        nn.BatchNorm2d(8),
        shared,
        nn.ReLU(),
        shared,
        nn.Dropout(0.5),
        nn.Flatten(),
        SparseLinear(8 * 36, 10, sparsity=0.9, seed=2),
    )


def test_every_sparse_layer_has_its_passes() -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    found = skd.explain(network(), (4, 3, 6, 6))
    assert [layer.name for layer in found.layers] == ["0", "2", "7"]
    first, second, last = found.layers
    assert set(first.passes) == {"fprop", "wgrad"}  # nothing needs the gradient of the images
    assert set(second.passes) == set(last.passes) == {"fprop", "dgrad", "wgrad"}
    assert second.shape == (8, 8, 3, 3)
    assert second.nnz == 115
    assert second.density == pytest.approx(0.2, abs=1e-3)
    for layer in found.layers:
        for times in layer.passes.values():
            assert times.backend == "cpp"  # small
            assert times.ms == times.sparse_ms > 0
            assert times.dense_ms > 0
        assert layer.ms == pytest.approx(sum(times.ms for times in layer.passes.values()))
        assert layer.break_even is None or 0 <= layer.break_even <= 1
    assert found.ms == pytest.approx(sum(layer.ms for layer in found.layers))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    pooled: torch.Tensor
    cache: Any = None


class Reader(nn.Module):
    """Take ids and a mask; return several outputs, each of a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.proj = SparseLinear(16, 16, sparsity=0.5, seed=0)
        self.head = SparseLinear(16, 20, sparsity=0.5, seed=1)
        self.pool = SparseLinear(16, 4, sparsity=0.5, seed=2)

    def forward(self, ids: torch.Tensor, *, mask: torch.Tensor, plain: bool = False) -> Any:
        x = self.proj(self.embedding(ids)) * mask[..., None]
        found = Output(self.head(x), self.pool(x[:, 0]), cache=("nothing", None))
        return {"a": [found.logits], "b": found.pooled, "ids": ids} if plain else found


@pytest.mark.parametrize("plain", [False, True])
def test_token_ids_by_name_and_outputs_of_any_kind(plain: bool) -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5)
    found = skd.explain(Reader(), ids, mask=mask, plain=plain)
    assert [layer.name for layer in found.layers] == ["proj", "head", "pool"]
    every = {"fprop", "dgrad", "wgrad"}
    assert all(set(layer.passes) == every for layer in found.layers)
    again = skd.explain(Reader(), args=(ids,), kwargs={"mask": mask, "plain": plain})
    assert [layer.name for layer in again.layers] == ["proj", "head", "pool"]


def test_layers_of_one_shape_but_other_tiles_are_timed_apart(monkeypatch) -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    explaining, timed = sys.modules["sparsekd.diagnose.explain"], []

    def spy(op: str, args: tuple[Any, ...], backend: str) -> PassTimes:
        timed.append(op)
        return time_pass(op, args, backend)

    monkeypatch.setattr(explaining, "time_pass", spy)
    tiled, other = (SparseLinear(64, 64, sparsity=0.75, layout="bcsr", seed=n) for n in (0, 1))
    plain = SparseLinear(64, 64, sparsity=0.75)
    found = skd.explain(nn.Sequential(nn.Linear(64, 64), tiled, other, plain), (4, 64))
    assert [layer.tile for layer in found.layers] == [(16, 16), (16, 16), (1, 1)]
    assert sorted(timed) == sorted(2 * ["linear", "linear_dgrad", "linear_wgrad"])


def test_the_table_has_a_line_per_layer() -> None:
    found = skd.explain(network(), (4, 3, 6, 6))
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0", "2", "7"]
    assert "8x8x3x3" in lines[2]
    assert lines[4].startswith("total")
    assert f"{torch.get_num_threads()} threads" in lines[-1]
    table = found.__rich__()
    assert table.row_count == 4


def test_a_pinned_backend_is_what_runs() -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    with skd.backend("dense"):
        found = skd.explain(network(), (4, 3, 6, 6))
    passes = [times for layer in found.layers for times in layer.passes.values()]
    assert {times.backend for times in passes} == {"dense"}
    assert {times.reason for times in passes} == {"this backend runs every product itself"}
    assert f"runs every product itself ({len(passes)})" in str(found)
    assert found.ms == pytest.approx(found.dense_ms)


def test_without_sparse_kernels_there_is_nothing_to_compare() -> None:
    with skd.backend("reference"):
        found = skd.explain(network(), (4, 3, 6, 6))
    for layer in found.layers:
        assert layer.break_even is None
        assert {times.backend for times in layer.passes.values()} == {"reference"}
        assert {times.sparse_ms for times in layer.passes.values()} == {None}
    assert "reference" in str(found)
    assert {row[-1] for row in found.rows()[1:-1]} == {"-"}


def test_the_model_and_those_who_listen_notice_nothing() -> None:
    class Listener:
        watched = None

        def on_call(self, op: str, args: tuple[Any, ...]) -> None:
            raise AssertionError(f"saw {op}")

    model = network().train()
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    before, grads = copy.deepcopy(model), [p.grad.clone() for p in model.parameters()]
    listener = Listener()
    observe.listeners.add(listener)
    skd.explain(model, (4, 3, 6, 6))
    assert listener in observe.listeners
    observe.listeners.discard(listener)
    assert all(module.training for module in model.modules())
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)
    for name, old in before.named_buffers():
        assert torch.equal(old, model.get_buffer(name))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ShapeError, match="trainable"):
        skd.explain(nn.ReLU(), (2, 3))


def test_probes_have_another_density_and_the_same_operands() -> None:
    layer = SparseConv2d(8, 8, 3, sparsity=0.9)
    x = torch.randn(2, 8, 5, 5)
    args = (
        x, layer.values, layer.crow_indices, layer.col_indices, None,
        [8, 8, 3, 3], [1, 1], [0, 0, 0, 0], [1, 1], 1,
    )  # fmt: skip
    probe = _with_density("conv2d", args, (8, 8, 3, 3), 0.5)
    assert probe[0] is x
    assert probe[4:] == args[4:]
    assert 200 < probe[3].shape[0] < 376
    assert probe[1].shape == probe[3].shape
    grad = torch.randn(2, 8, 3, 3)
    probe = _with_density("conv2d_wgrad", (grad, x, *args[2:4], *args[5:]), (8, 8, 3, 3), 0.05)
    assert probe[1] is x


@pytest.mark.parametrize(
    "intercept, full, dense, expected",
    [(1.0, 9.0, 5.0, 0.5), (1.0, 5.0, 6.0, 0.0), (5.0, 9.0, 5.0, None), (0.0, 10.0, 1.0, 0.9)],
)
def test_break_even_is_where_the_lines_meet(
    intercept: float, full: float, dense: float, expected: float | None
) -> None:
    times = PassTimes("cpp", 1.0, dense, 1.0, intercept, full)
    assert times.break_even == (expected if expected is None else pytest.approx(expected))


def test_the_line_goes_through_measured_points() -> None:
    assert _line({10: 3.0, 50: 11.0, 100: 21.0}, 200) == pytest.approx((1.0, 41.0))
    assert _line({10: 3.0}, 200) == (3.0, 3.0)
    intercept, full = _line({10: 3.0, 100: 2.0}, 200)  # noise must not make nonzeros profitable
    assert intercept == full > 0


def test_dense_bfloat16_is_timed_beside_sparse_and_dense(monkeypatch) -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    if not onednn_computes(torch.bfloat16):
        pytest.skip("this processor has no bfloat16")
    found = skd.explain(network(), (4, 3, 6, 6))
    for layer in found.layers:
        assert layer.bf16_ms is not None
        assert layer.bf16_ms == pytest.approx(sum(t.bf16_ms or 0 for t in layer.passes.values()))
        assert layer.bf16_ms > 0
    assert found.bf16_ms == pytest.approx(sum(layer.bf16_ms or 0 for layer in found.layers))
    header, *rows = found.rows()
    assert rows[0][header.index("bf16")] == f"{found.layers[0].bf16_ms:.3g}"
    assert "dense in bfloat16" in found.caption


def test_without_instructions_for_bfloat16_it_is_said_to_be_slower(monkeypatch) -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    for module in ("breakeven", "explain"):
        name = sys.modules[f"sparsekd.diagnose.{module}"]
        monkeypatch.setattr(name, "onednn_computes", lambda dtype: dtype != torch.bfloat16)
    found = skd.explain(network(), (4, 3, 6, 6))
    assert found.bf16_ms is None
    assert {layer.bf16_ms for layer in found.layers} == {None}
    assert "dense bfloat16 is slower here than dense float32" in found.caption


def test_float64_has_no_bfloat16_beside_it() -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    found = skd.explain(network().double(), (4, 3, 6, 6))
    assert {layer.bf16_ms for layer in found.layers} == {None}
