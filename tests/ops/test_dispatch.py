"""Who runs which op when nobody has said it, and that a choice stays made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekd as skd
from sparsekd import ops
from sparsekd.nn import SparseConv2d, SparseLinear

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd.ops import observe
from sparsekd.ops.cpu import cpp, dense
from sparsekd.ops.dispatch import auto, cache_key
from sparsekd.ops.dispatch.auto import Dispatcher
from sparsekd.ops.dispatch.choices import Choices
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.ops.kernel import products

BACKENDS = {"cpp": cpp, "dense": dense}
CONV = ([1, 1], [1, 1, 1, 1], [1, 1], 1)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let every test start as a new process does, with a file of its own."""
    monkeypatch.delenv("SPARSEKD_BACKEND", raising=False)
    path = tmp_path / "choices.jsonl"
    start_process(monkeypatch, path)
    return path


def start_process(monkeypatch: pytest.MonkeyPatch, path: Path | None) -> None:
    made = Dispatcher(Choices(path))
    monkeypatch.setattr(auto, "dispatcher", lambda: made)
    for product in products.values():
        monkeypatch.setattr(product, "_known", {})


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Decide races instead of timing them: sparse wins forward, dense backward; list them."""
    run: list[str] = []

    def decide(calls: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        run.append(calls["cpp"].func.__name__)  # type: ignore[attr-defined]
        forward = run[-1] in ("conv2d", "linear")
        return {"cpp": [1.0], "dense": [1.2]} if forward else {"cpp": [1.2], "dense": [1.0]}

    monkeypatch.setattr(auto, "interleave", decide)
    return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List which backend runs which op."""
    seen: list[str] = []

    def counted(name: str, op: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            seen.append(f"{name} {op}")
            return run(*args)

        call.__name__ = op
        return call

    for name, module in BACKENDS.items():
        for op in ("conv2d", "conv2d_dgrad", "conv2d_wgrad"):
            monkeypatch.setattr(module, op, counted(name, op, getattr(module, op)))
    prepare = BACKENDS["cpp"].prepare

    def counted_later(op: str, args: tuple[Any, ...]) -> Callable[..., Tensor] | None:
        run = prepare(op, args)
        return None if run is None else counted("cpp", op, run)

    monkeypatch.setattr(BACKENDS["cpp"], "prepare", counted_later)
    return seen


def layer(sparsity: float = 0.5, channels: int = 32, seed: int = 0) -> SparseConv2d:
    return SparseConv2d(channels, channels, 3, padding=1, sparsity=sparsity, seed=seed)


def step(conv: torch.nn.Module, batch: int = 8, channels: int = 32) -> list[Tensor]:
    x = torch.randn(batch, channels, 12, 12, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    y = conv(x)
    return [y.detach(), *torch.autograd.grad((y * y).sum(), [x, *conv.parameters()])]


FORWARD_SPARSE = ["cpp conv2d", "dense conv2d_dgrad", "dense conv2d_wgrad"]


def test_each_direction_is_measured_once_and_then_runs_the_faster_way(
    races: list[str], calls: list[str]
) -> None:
    conv = layer()
    first = step(conv)
    assert sorted(races) == ["conv2d", "conv2d_dgrad", "conv2d_wgrad"]
    calls.clear()
    again = step(conv)
    assert len(races) == 3
    assert sorted(calls) == FORWARD_SPARSE
    assert all(map(torch.equal, first, again))


def test_a_later_process_makes_the_same_choices(
    races: list[str], calls: list[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = step(layer())
    races.clear()
    calls.clear()
    start_process(monkeypatch, file)
    assert all(map(torch.equal, first, step(layer())))
    assert races == []
    assert sorted(calls) == FORWARD_SPARSE


def test_without_a_file_choices_last_as_long_as_the_process(
    races: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_process(monkeypatch, None)
    step(layer())
    step(layer())
    assert len(races) == 3


def test_kinds_that_time_differently_are_measured_apart(races: list[str]) -> None:
    for conv, batch in ((layer(), 8), (layer(), 100), (layer(0.8), 8), (layer(channels=33), 8)):
        step(conv, batch, conv.in_channels)
        step(
            SparseConv2d.from_dense(conv.to_dense(), conv.topology.mask()), batch, conv.in_channels
        )
    assert len(races) == 12
    torch.set_num_threads(2)
    step(layer())
    assert len(races) == 15
    channels_last = torch.randn(8, 32, 12, 12).contiguous(memory_format=torch.channels_last)
    layer()(channels_last)
    assert len(races) == 16


def test_close_densities_share_a_choice(races: list[str]) -> None:
    step(layer(0.9, seed=1))
    step(layer(0.899, seed=2))
    step(layer(0.87, seed=1))
    assert len(races) == 3
    step(layer(0.8, seed=1))
    assert len(races) == 6


def test_a_rewired_layer_is_not_measured_again(races: list[str]) -> None:
    conv = layer()
    step(conv)
    conv.rewire(conv.topology.mask().flip(0))
    step(conv)
    assert len(races) == 3


def test_small_and_empty_layers_run_sparse_and_full_ones_dense_unmeasured(
    races: list[str], calls: list[str]
) -> None:
    step(layer(), batch=1)
    step(layer(1.0))
    assert {call.split()[0] for call in calls} == {"cpp"}
    calls.clear()
    step(layer(0.0))
    assert calls == []  # torch's own convolution, its derivative included
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(layer(0.0))
    assert {call.split()[0] for call in calls} == {"dense"}
    assert races == []


def test_every_size_of_a_map_is_not_raced(races: list[str]) -> None:
    """Multi-scale training, and the smaller batch that ends an epoch."""
    conv = layer(0.8)
    for side in range(24, 56, 4):
        conv(torch.ones(4, 32, side, side, requires_grad=True)).sum().backward()
    conv(torch.ones(3, 32, 40, 56, requires_grad=True)).sum().backward()
    assert sorted(races) == ["conv2d", "conv2d_dgrad", "conv2d_wgrad"]


def test_every_number_of_tokens_is_not_raced(races: list[str]) -> None:
    fully = SparseLinear(256, 256, sparsity=0.8)
    for tokens in range(100, 600, 10):
        fully(torch.ones(tokens, 256, requires_grad=True)).sum().backward()
    fully(torch.ones(2, 250, 256))
    assert len(races) <= 2 * 3


def test_every_density_on_the_way_to_another_is_not_raced(races: list[str]) -> None:
    for sparsity in range(10, 81):  # a pruning schedule of 70 steps to 80 %
        step(layer(sparsity / 100))
    assert len(races) <= 5 * 3


def test_much_larger_inputs_are_raced(races: list[str]) -> None:
    fully = SparseLinear(256, 256, sparsity=0.8)
    fully(torch.ones(100, 256))
    assert len(races) == 1
    fully(torch.ones(1000, 256))
    assert len(races) == 2


def test_a_listener_sees_every_pass_whoever_runs_it(races: list[str]) -> None:
    class Listener:
        watched = None

        def __init__(self) -> None:
            self.ops: list[str] = []

        def on_call(self, op: str, args: tuple[Any, ...]) -> None:
            self.ops.append(op)

    for sparsity in (0.0, 0.5, 1.0):
        listener = Listener()
        observe.listeners.add(listener)
        step(layer(sparsity))
        assert sorted(listener.ops) == ["conv2d", "conv2d_dgrad", "conv2d_wgrad"]
        observe.listeners.discard(listener)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padding", [1, (0, 1, 2, 1)])
def test_a_layer_without_zeros_equals_its_dense_twin(dtype: torch.dtype, padding: Any) -> None:
    conv = SparseConv2d(32, 32, 3, padding="same", sparsity=0.0).to(dtype)
    x = torch.randn(8, 32, 14, 14, dtype=dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for name in ("auto", "cpp"):
        with skd.backend(name):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = skd.functional.conv2d(conv.topology, conv.values, leaf, conv.bias, padding=padding)
            gradients = torch.autograd.grad(y.square().sum(), [leaf, *conv.parameters()])
            results.append([y, *gradients])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == dtype
        assert a.stride() == b.stride()
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert error < 4 * torch.finfo(dtype).eps * math.sqrt(8 * 14 * 14)


@pytest.mark.parametrize("name", ["cpp", "dense"])
def test_a_named_backend_is_not_measured(races: list[str], calls: list[str], name: str) -> None:
    with skd.backend(name):
        step(layer())
    assert races == []
    assert {call.split()[0] for call in calls} == {name}
    with skd.backend(name), skd.backend("auto"):
        step(layer())
    assert len(races) == 3


def test_a_real_race_gives_what_the_sparse_kernels_give() -> None:
    chosen = step(layer())
    with skd.backend("cpp"):
        sparse = step(layer())
    for a, b in zip(chosen, sparse, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(auto.dispatcher().choices) == 3


def test_a_choice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="sparsekd.ops.dispatch.auto"):
        step(layer())
    assert len(caplog.records) == 3
    assert "conv2d_wgrad float32 threads=1" in caplog.text
    assert "from now on" in caplog.text


def test_the_plans_of_a_layer_that_runs_dense_are_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decide(calls: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {"cpp": [2.0], "dense": [1.0]}

    monkeypatch.setattr(auto, "interleave", decide)
    conv = layer(0.2)
    before = ops.info()["cpp"]["cached_bytes"]
    step(conv)
    indices = 4 * (conv.crow_indices.numel() + conv.topology.nnz)
    assert ops.info()["cpp"]["cached_bytes"] - before <= indices


def test_the_choice_of_an_op_can_be_asked_for() -> None:
    topology = layer().topology
    args = (
        torch.ones(1, 32, 4, 4), torch.ones(topology.nnz), topology.crow_indices,
        topology.col_indices, None, [32, 32, 3, 3], *CONV,
    )  # fmt: skip
    decision = decide("conv2d", args)
    assert (decision.backend, decision.reason) == ("cpp", "few multiplications")
    assert (decision.run, decision.key, decision.ms) == (cpp.conv2d, None, {})
    assert cache_key.products("conv2d", args) == 16 * 32 * 32 * 9


def test_a_decision_has_the_key_and_the_times_of_what_was_measured(races: list[str]) -> None:
    topology = layer().topology
    args = (
        torch.ones(8, 32, 12, 12), torch.ones(topology.nnz), topology.crow_indices,
        topology.col_indices, None, [32, 32, 3, 3], *CONV,
    )  # fmt: skip
    first, again = decide("conv2d", args), decide("conv2d", args)
    assert races == ["conv2d"]
    assert (first.backend, first.reason, first.ms) == ("cpp", "measured", {"cpp": 1, "dense": 1.2})
    assert first.key == again.key == auto.key_of("conv2d", args)
    assert first.key is not None
    known = auto.dispatcher().choices.get(*first.key)
    assert known is not None
    assert (known.backend, known.times) == (again.backend, again.ms)
    like = decide("conv2d", (torch.ones(9, 32, 16, 16), *args[1:]))
    assert like.reason.startswith("estimated")
    assert races == ["conv2d"]


def test_layers_of_equal_shape_but_other_tiles_have_choices_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sparse wins with tiles only, whichever layer runs first."""

    def decide(calls: dict[str, Any]) -> dict[str, list[float]]:
        args = calls["cpp"].args
        tiled = cpp.tile_size(args[2], args[3], [128, 128], 1) != (1, 1)
        return {"cpp": [1.0 if tiled else 3.0], "dense": [2.0]}

    monkeypatch.setattr(auto, "interleave", decide)
    ran: list[str] = []
    for name, module in BACKENDS.items():
        run = module.linear

        def noted(*args: Any, name: str = name, run: Callable[..., Tensor] = run) -> Tensor:
            ran.append(name)
            return run(*args)

        monkeypatch.setattr(module, "linear", noted)
    monkeypatch.setattr(BACKENDS["cpp"], "prepare", lambda op, args: None)
    x = torch.ones(1000, 128)
    for _ in range(2):  # the second pair may get the memory of the first
        tiled = SparseLinear(128, 128, sparsity=0.75, layout="bcsr")
        plain = SparseLinear(128, 128, sparsity=0.75)
        assert tiled.topology.nnz == plain.topology.nnz
        for fully in (tiled, plain, tiled):
            fully(x)
        assert ran == ["cpp", "dense", "cpp"]
        ran.clear()
        del tiled, plain, fully


def test_explain_shows_the_backend_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(calls: dict[str, Any]) -> dict[str, list[float]]:
        args = calls["cpp"].args
        tiled = cpp.tile_size(args[2], args[3], [128, 128], 1) != (1, 1)
        return {"cpp": [1.0 if tiled else 3.0], "dense": [2.0]}

    monkeypatch.setattr(auto, "interleave", decide)
    layers = [
        SparseLinear(128, 128, sparsity=0.75, layout=layout, seed=0) for layout in ("bcsr", "csr")
    ]
    found = skd.explain(torch.nn.Sequential(torch.nn.Linear(128, 128), *layers), (1000, 128))
    assert [{times.backend for times in report.passes.values()} for report in found.layers] == [
        {"cpp"},
        {"dense"},
    ]


def test_what_cannot_be_made_dense_runs_sparse(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> Tensor:
        raise RuntimeError("not enough memory: you tried to allocate 40000000000 bytes")

    monkeypatch.setattr(dense, "linear", full)
    fully = SparseLinear(128, 128, sparsity=0.9)
    x = torch.randn(1000, 128)
    y = fully(x)
    assert "not enough memory" in caplog.text
    torch.testing.assert_close(y, x @ fully.dense_weight().T + fully.bias, rtol=1e-4, atol=1e-4)
