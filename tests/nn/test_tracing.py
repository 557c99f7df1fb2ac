"""What torch traces, exports and compiles of a sparse model, and what it says where it cannot."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.errors import UnsupportedError

DTYPE = torch.float64
CONVS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": (1, 2), "bias": False},
    "strided": {"stride": (2, 1), "dilation": (1, 2)},
    "same": {"padding": "same", "groups": 2},
    "depthwise": {"groups": 4, "padding": 1, "out_channels": 8},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 0), "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "channels_last": {"padding": 1},
}
LAYERS = ["linear", "linear without bias", *CONVS]


class Layer(nn.Module):
    """One sparse layer between other operations."""

    def __init__(self, name: str) -> None:
        super().__init__()
        if name in CONVS:
            options = {"out_channels": 6, "kernel_size": 3, **CONVS[name]}
            self.layer = skd.nn.SparseConv2d(4, sparsity=0.5, dtype=DTYPE, **options)
            self.layer.channels_last = name == "channels_last"
        else:
            bias = "without" not in name
            self.layer = skd.nn.SparseLinear(8, 5, bias=bias, sparsity=0.5, dtype=DTYPE)

    def forward(self, x):  # torch.fx cannot pickle annotations that are strings
        return self.layer(x.sin()).tanh()


def sample(name: str, batch: int) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(*((batch, 4, 9, 8) if name in CONVS else (batch, 8)), dtype=DTYPE)


def dense_results(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return results(skd.densify(copy.deepcopy(model)), x)


def results(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient of the input."""
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    return y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def symbolic_trace(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.fx.symbolic_trace(model)


def copied_trace(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return copy.deepcopy(torch.fx.symbolic_trace(model))


def pickled_trace(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))


def jit_trace(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(model, x)


def saved_jit_trace(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    return torch.jit.load(file)


def export(model: nn.Module, x: Tensor, strict: bool = False) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def strict_export(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return export(model, x, strict=True)


def compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "capture",
    [
        symbolic_trace,
        copied_trace,
        pickled_trace,
        jit_trace,
        saved_jit_trace,
        export,
        strict_export,
        compiled,
    ],
)
def test_a_captured_model_computes_the_same(capture: Callable[..., Any], name: str) -> None:
    model = Layer(name)
    run = capture(model, sample(name, 3))
    for batch in (3, 5):
        x = sample(name, batch)
        assert_equal(results(run, x), dense_results(model, x))


@pytest.mark.parametrize("capture", [symbolic_trace, copied_trace, pickled_trace])
@pytest.mark.parametrize("name", LAYERS)
def test_fx_traces_a_layer_alone(capture: Callable[..., Any], name: str) -> None:
    layer = Layer(name).layer
    run, x = capture(layer, sample(name, 3)), sample(name, 4)
    assert_equal(results(run, x), dense_results(layer, x))


def test_fx_traces_one_image() -> None:
    model, x = Layer("reflect"), sample("reflect", 1)[0]
    assert_equal(results(torch.fx.symbolic_trace(model), x), dense_results(model, x))


@pytest.mark.parametrize("name", ["linear", "padded"])
def test_a_traced_model_is_sparse_and_follows_a_rewire(name: str) -> None:
    model, x = Layer(name), sample(name, 3)
    traced = torch.fx.symbolic_trace(model)
    assert traced.layer is model.layer
    assert list(traced.state_dict()) == list(model.state_dict())
    model.layer.rewire(~model.layer.topology.mask())
    nn.init.normal_(model.layer.values)
    assert_equal(results(traced, x), dense_results(model, x))
    assert_equal(results(skd.densify(traced), x), results(model, x))


@pytest.mark.parametrize("base", [skd.nn.SparseLinear, skd.nn.SparseConv2d])
def test_fx_traces_into_the_forward_of_a_subclass(base: type) -> None:
    class Shifted(base):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x) + 1

    shape, args = ((3, 8), (8, 5)) if base is skd.nn.SparseLinear else ((3, 2, 6, 6), (2, 4, 3))
    model, x = nn.Sequential(Shifted(*args, dtype=DTYPE)), torch.randn(shape, dtype=DTYPE)
    assert_equal(results(torch.fx.symbolic_trace(model), x), results(model, x))
    assert_equal(model(x), skd.densify(copy.deepcopy(model))(2 * x) + 1)


@pytest.mark.parametrize("name", ["linear", "padded"])
def test_fx_traces_hooks_once(name: str) -> None:
    model, x = Layer(name), sample(name, 3)
    expected = dense_results(model, x)
    handle = model.layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.layer.register_forward_hook(lambda module, args, y: y * 1)
    traced = torch.fx.symbolic_trace(model)
    assert_equal(results(traced, x), results(model, x))
    handle.remove()
    assert_equal(results(model, x), expected)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_fx_traces_functions(padding_mode: str) -> None:
    topology = skd.Topology.from_mask(torch.rand(4, 2, 3, 3) < 0.5)
    values = torch.randn(topology.nnz, dtype=DTYPE)
    flat = skd.Topology.from_mask(torch.rand(5, 4) < 0.5)
    weights = torch.randn(flat.nnz, dtype=DTYPE)

    def run(x: Tensor) -> Tensor:
        y = skd.functional.conv2d(topology, values, x, padding=1, padding_mode=padding_mode)
        return skd.functional.linear(flat, weights, y.mean((-2, -1)))

    x = torch.randn(3, 2, 5, 5, dtype=DTYPE)
    assert_equal(results(torch.fx.symbolic_trace(run), x), results(run, x))


def network() -> nn.Module:
    return nn.Sequential(
        skd.nn.SparseConv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        skd.nn.SparseLinear(64, 3),
    ).eval()  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("model", [network(), network()[0], network()[4]], ids=str)
def test_script_names_densify(model: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=r"skd\.densify"):
        torch.jit.script(model)
    torch.jit.script(skd.densify(copy.deepcopy(model)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("part", [slice(None), slice(0, 1), slice(4, 5)], ids=str)
def test_onnx_export_names_densify(dynamo: bool, part: slice) -> None:
    if dynamo:
        pytest.importorskip("onnxscript", reason="torch's exporter is built on onnxscript")
    model = network()[part]
    x = torch.randn(2, 64) if part.start == 4 else torch.randn(2, 2, 6, 6)
    with pytest.raises((UnsupportedError, torch.onnx.OnnxExporterError), match=r"skd\.densify"):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo, verbose=False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx_export_of_an_exported_program_names_densify() -> None:
    pytest.importorskip("onnxscript", reason="torch's exporter is built on onnxscript")
    program = torch.export.export(network(), (torch.randn(2, 2, 6, 6),))
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"skd\.densify"):
        torch.onnx.export(program, (), io.BytesIO(), dynamo=True, verbose=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dynamo", [False, True])
def test_a_densified_model_exports_to_onnx(dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx", reason="writing an ONNX file needs onnx")
    if dynamo:
        pytest.importorskip("onnxscript", reason="torch's exporter is built on onnxscript")
    file, model = io.BytesIO(), skd.densify(skd.optimize(network()))
    torch.onnx.export(model, (torch.randn(2, 2, 6, 6),), file, dynamo=dynamo, verbose=False)
    file.seek(0)
    assert "Conv" in {node.op_type for node in onnx.load(file).graph.node}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("capture", [jit_trace, export, strict_export])
def test_a_graph_that_leaves_holds_no_fused_norm(capture: Callable[..., Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3, dtype=DTYPE), nn.BatchNorm2d(4, dtype=DTYPE)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)))

    model = Net().eval()
    x, plain = torch.randn(3, 2, 6, 6, dtype=DTYPE), copy.deepcopy(model)
    graph = capture(skd.optimize(model), x)
    assert "sparsekd::" not in str(graph.graph)
    assert "sparsekd.norm" not in str(graph.graph)
    assert_equal(results(graph, x), results(plain, x))
