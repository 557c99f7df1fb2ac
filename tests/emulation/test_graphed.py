"""`skd.cuda.graphed` trains as a plain loop does; the kernels that it replays are emulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded import Tape
from torch import Tensor, nn

import sparsekd as skd
from sparsekd import cuda
from sparsekd.errors import UnsupportedError


class TapeRecorder(cuda.Recorder):
    """Records launches of the emulated library and torch's calls, instead of a CUDA graph."""

    library: Any

    @staticmethod
    def possible(device: torch.device) -> bool:
        return True

    def run(self, device: torch.device, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with Tape(pytest.MonkeyPatch(), self.library, "_queue") as tape:
            result = work()
        assert tape.launches
        return result, tape.replay


@pytest.fixture
def taped(on_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TapeRecorder, "library", on_cuda, raising=False)
    monkeypatch.setattr(cuda, "Recorder", TapeRecorder)


def network(layout: str = "csr") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)),
    )
    return skd.sparsify(model, sparsity=0.5, layout=layout, seed=0)


def batches(count: int, sizes: tuple[int, ...] = (4,)) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    rows = [sizes[i % len(sizes)] for i in range(count)]
    return [(torch.randn(n, 3, 6, 6), torch.randint(4, (n,))) for n in rows]


class Course:
    """A training run, in graphs or not."""

    def __init__(
        self,
        graphs: bool,
        method: Callable[[nn.Module, torch.optim.Optimizer], Any] | None,
        data: list[tuple[Tensor, Tensor]],
        **options: Any,
    ) -> None:
        self.model, self.calls, self.losses = network(), 0, list[float]()
        opt = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        rates = torch.optim.lr_scheduler.LinearLR(opt, total_iters=len(data))
        dst = method(self.model, opt) if method else None
        step: Any = self.step
        if graphs:
            step = skd.cuda.graphed(step, self.model, dst, **options)
        self.recorded = list[int]()
        for x, y in data:
            opt.zero_grad()
            self.losses.append(step(x, y)["loss"].item())
            if dst is None or not dst.step():
                opt.step()
            rates.step()
            self.recorded.append(step.recorded if graphs else 0)

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        return {"loss": loss}


def assert_same(ours: Course, plain: Course) -> None:
    assert ours.losses == pytest.approx(plain.losses, rel=1e-6)
    for (name, a), b in zip(
        ours.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        # What is recorded runs once meanwhile, on a tape; BatchNorm sees that batch twice.
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


METHODS: dict[str, tuple[Any, Callable[[list[int]], bool]]] = {
    "none": (None, lambda seen: seen == [0, 0] + 12 * [1]),
    # Same size, so tensors keep their place: recorded once.
    "rigl": (
        lambda m, o: skd.dst.RigL(m, o, every=4, until=12, drop_fraction=0.4),
        lambda seen: seen[3:] == 11 * [1],
    ),
    "set": (
        lambda m, o: skd.dst.SET(m, o, every=3, until=12, drop_fraction=0.4),
        lambda seen: seen[3:] == 11 * [1],
    ),
    # Layers change size: recorded anew after each update.
    "gmp": (
        lambda m, o: skd.dst.GMP(m, o, sparsity=0.8, begin=1, until=9, every=4),
        lambda seen: 0 in seen[3:] and seen[-1] == 1,
    ),
    # Reads dense gradients in every iteration up to the last update.
    "snfs": (
        lambda m, o: skd.dst.SNFS(m, o, every=4, until=10, drop_fraction=0.4),
        lambda seen: not any(seen[:9]) and seen[-1] == 1,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_graphs_is_the_plain_run(taped: None, method: str) -> None:
    make, expected = METHODS[method]
    data = batches(14)
    plain, ours = Course(False, make, data), Course(True, make, data, warmup=2)
    assert expected(ours.recorded), ours.recorded
    assert ours.calls < plain.calls == len(data)
    assert_same(ours, plain)
    if make:
        assert any(m.topology.version for _, m in skd.nn.sparse_modules(ours.model))


def test_a_graph_for_each_size_and_no_more_than_asked(taped: None) -> None:
    data = batches(16, (4, 2, 3, 4))
    plain, ours = Course(False, None, data), Course(True, None, data, warmup=1, most=2)
    assert ours.recorded[-1] == 2
    assert_same(ours, plain)


def test_a_loaded_topology_is_recorded_anew(taped: None) -> None:
    model, other = network(), network()
    for _, module in skd.nn.sparse_modules(other):
        module.rewire(module.topology.mask().flip(0))

    def step(x: Tensor) -> Tensor:
        loss = model(x).square().sum()
        loss.backward()
        return loss

    run = skd.cuda.graphed(step, model, warmup=1)
    ((x, _),) = batches(1)
    run(x), run(x)
    assert run.recorded == 1
    model.load_state_dict(other.state_dict())
    for expected in (0, 1, 1):
        loss = run(x)
        assert run.recorded == expected
        # The same by another copy, whose statistics do not matter while it trains.
        torch.testing.assert_close(loss, other(x).square().sum().detach(), rtol=1e-5, atol=1e-5)
    other.zero_grad()
    other(x).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)


def test_results_stay_when_the_graph_runs_again(taped: None) -> None:
    model = network()

    def step(x: Tensor) -> tuple[Tensor, int]:
        loss = model(x).square().sum()
        loss.backward()
        return loss, len(x)

    run = skd.cuda.graphed(step, model, warmup=1)
    results = [run(x) for x, _ in batches(4)]
    assert len({loss.item() for loss, _ in results}) == 4
    assert all(not loss.requires_grad and count == 4 for loss, count in results)


def test_refusals(taped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="model: expected sparse modules"):
        skd.cuda.graphed(lambda x: x, nn.Linear(2, 2))
    for name in ("warmup", "most"):
        with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
            skd.cuda.graphed(lambda x: x, network(), **{name: 0})
    run = skd.cuda.graphed(lambda *x: x[0].sum(), network(), warmup=1)
    for wrong in ((), (torch.ones(1), 3), (torch.ones(1), torch.ones(1, device="meta"))):
        with pytest.raises(ValueError, match="inputs: expected tensors on one device"):
            run(*wrong)

    def fails(self: Any, work: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(TapeRecorder, "record", fails)
    run(torch.ones(1))
    with pytest.raises(UnsupportedError, match=r"step: cannot be recorded .* not permitted when"):
        run(torch.ones(1))
