"""`skd.freeze`: a trained model as a module for inference alone."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.frozen.draft import PRODUCT
from sparsekd.frozen.islands import Island, capture, cut

_MOST_SHAPES = 4


class FrozenModule(nn.Module):
    """A model for inference, made by `skd.freeze`; its weights do not change any more.

    Runs float32 on the CPU, on `torch.get_num_threads()` threads. What the compiled network cannot
    do runs in torch, see `outside`.

    Shape: inputs and results are those of the model; the batch may be any.

    Raises:
        ShapeError: inputs of a shape that it was not made for, if it was loaded from a file.
        UnsupportedError: another dtype or device, or an input that needs a gradient.
    """

    def __init__(self, model: nn.Module | None, int8: bool = False) -> None:
        super().__init__()
        self._int8 = int8
        self._model = [model]  # in a list: neither its parameters nor its modules are ours
        self._graphs: OrderedDict[Any, fx.GraphModule] = OrderedDict()
        self.training = False

    def prepare(self, *inputs: Any) -> fx.GraphModule:
        """Return the graph for inputs of these shapes, made when they first come."""
        key: Any = tuple(
            (tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else repr(x) for x in inputs
        )
        batch = next((len(x) for x in inputs if isinstance(x, Tensor) and x.ndim), None)
        if (batch, key) in self._graphs:
            key = (batch, key)
        if key not in self._graphs:
            model = self._model[0]
            if model is None:
                raise ShapeError(
                    f"frozen network from a file: expected inputs of {list(self._graphs)}, "
                    f"got {key}"
                )
            graph, any_batch = _freeze_for(model, inputs, self._int8)
            key = key if any_batch else (batch, key)
            self.keep(key, graph)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def keep(self, key: Any, graph: fx.GraphModule) -> None:
        """Keep the graph for inputs of one shape, and forget the one that was used longest ago."""
        self._graphs[key] = graph
        if len(self._graphs) > _MOST_SHAPES:
            self._graphs.popitem(last=False)

    def forward(self, *inputs: Any) -> Any:
        return self.prepare(*inputs)(*inputs)

    def train(self, mode: bool = True) -> FrozenModule:
        if mode:
            raise UnsupportedError("a frozen network cannot be trained: train the model it is of")
        return self

    @property
    def islands(self) -> list[Island]:
        """The compiled parts for the inputs that came last."""
        return [m for m in self._last().modules() if isinstance(m, Island)]

    @property
    def outside(self) -> list[str]:
        """The operators that run in torch, for the inputs that came last, in their order."""
        return outside(self._last())

    @property
    def removed_channels(self) -> int:
        """How many channels layers have lost that nothing went into, or that nothing read."""
        return sum(island.removed for island in self.islands)

    @property
    def stored_values(self) -> int:
        """How many weights the compiled parts hold."""
        return sum(map(len, self._values()))

    def _values(self) -> list[Tensor]:
        nodes = [node for island in self.islands for node in island.nodes]
        return [node.lists["values"] for node in nodes if node.kind == PRODUCT]

    def extra_repr(self) -> str:
        if not self._graphs:
            return "for no input yet"
        kinds = {str(values.dtype).removeprefix("torch.") for values in self._values()}
        facts = [
            f"{len(self.islands)} compiled parts of {self.stored_values:,} weights, "
            f"{' and '.join(sorted(kinds))}"
        ]
        if self.removed_channels:
            facts.append(f"{self.removed_channels} dead channels removed")
        if self.outside:
            facts.append(f"in torch: {', '.join(sorted(set(self.outside)))}")
        return "; ".join(facts)

    @property
    def arguments(self) -> int:
        """How many inputs the model takes."""
        return sum(node.op == "placeholder" for node in self._last().graph.nodes)

    def _last(self) -> fx.GraphModule:
        if not self._graphs:
            raise UnsupportedError("freeze: call the module once, or give freeze() example inputs")
        return next(reversed(self._graphs.values()))


def _freeze_for(
    model: nn.Module, inputs: tuple[Any, ...], int8: bool
) -> tuple[fx.GraphModule, bool]:
    """Return the graph for inputs like these, and whether the batch may be any."""
    first = next((x for x in inputs if isinstance(x, Tensor) and x.ndim), None)
    if first is None:
        raise ShapeError("freeze: expected an input that is a tensor with a batch")
    # Two images at least: torch takes a batch of one for a constant.
    graph, any_batch = _freeze_batch(model, inputs, len(first), 2, int8)
    if not any_batch and len(first) != 2:
        graph, _ = _freeze_batch(model, inputs, len(first), len(first), int8)
    return graph, any_batch


def _freeze_batch(
    model: nn.Module, inputs: tuple[Any, ...], batch: int, traced: int, int8: bool
) -> tuple[fx.GraphModule, bool]:
    """Trace a model with so many images in the place of the batch.

    A model that asks for `len(x)` has the number in its graph. What runs compiled goes image by
    image and needs it nowhere, but operators that run in torch may.
    """
    examples = tuple(
        torch.zeros((traced, *x.shape[1:]), dtype=x.dtype)
        if isinstance(x, Tensor) and x.ndim and len(x) == batch
        else x
        for x in inputs
    )
    with torch.inference_mode(False), torch.no_grad():
        graph = capture(model, examples)
        images = next(
            node.meta["val"].shape[0]
            for node in graph.graph.nodes
            if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
        )
        found = cut(graph, images, int8)
    return found, not is_concrete_int(images) or not outside(found)


def outside(graph: fx.GraphModule) -> list[str]:
    """Return the operators of a graph that run in torch."""
    return [
        str(node.target)
        for node in graph.graph.nodes
        if node.op == "call_function"
        and "sym_size" not in str(node.target)
        and not (node.target is operator.getitem and node.args[0].op == "call_module")
    ]


def freeze(model: nn.Module, *inputs: Any, weights: str = "float32") -> FrozenModule:
    """Return a module for inference with a trained model, sparse or not, as it is now.

    BatchNorm becomes part of the weights, additions and activations part of the layer before them,
    and maps stay in the kernels' own layout from the first layer to the last, with no Python
    between them. Dead channels, those without an input or a reader, are removed; `print` the result
    to see how many.

    Args:
        model: any module that torch.export can trace; stays as it is.
        inputs: examples, of any batch. Without them the first call prepares the module, and so
            does every call with images of another size.
        weights: "float32", or "int8", which rounds every weight to a whole number of steps. A step
            is 1/127 of the largest magnitude in its output channel, BatchNorm included, so no
            weight moves by more than 1/254 of that. Maps stay float32. Files get 1.8 times smaller,
            and layers of few pixels read half as much.

    Returns:
        a module whose results are those of the model in eval mode, up to float32 rounding; with
        int8 those of the model with its weights rounded.

    Raises:
        ValueError: `weights` is neither.
        UnsupportedError: torch.export cannot trace the model, it is not float32 on the CPU, or int8
            cannot hold a weight: infinity or NaN.

    Example:
        >>> import sparsekd as skd
        >>> model = skd.sparsify(skd.models.resnet20(num_classes=10), sparsity=0.9)
        >>> frozen = freeze(model, torch.zeros(1, 3, 32, 32))
        >>> frozen(torch.zeros(5, 3, 32, 32)).shape, frozen.outside
        (torch.Size([5, 10]), [])
    """
    if weights not in ("float32", "int8"):
        raise ValueError(f"weights: expected 'float32' or 'int8', got {weights!r}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu" or (
            tensor.is_floating_point() and tensor.dtype != torch.float32
        ):
            raise UnsupportedError(
                f"freeze: expected a model of float32 on the CPU, got {tensor.dtype} on "
                f"{tensor.device} in {name}"
            )
    with torch.inference_mode(False):  # whose tensors know nothing of writes
        frozen = FrozenModule(copy.deepcopy(model).eval(), weights == "int8")
    if inputs:
        frozen.prepare(*inputs)
    return frozen
