"""A model's graph cut into parts that run compiled and operators that run in torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from sparsekd import ops
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.frozen.attention import fuse_attention
from sparsekd.frozen.constants import constants, fold_constants
from sparsekd.frozen.dead import remove_dead
from sparsekd.frozen.draft import ATTENTION, PRODUCT, Draft, Node, rounded
from sparsekd.frozen.rules import RULES
from sparsekd.frozen.sequence import fuse_sequences
from sparsekd.frozen.values import Outside, Values


class Island(nn.Module):
    """Part of a model that runs compiled, from one call to the end.

    Args:
        nodes: of the network.
        outputs: numbers of the nodes that it returns.
        input_shapes: of the inputs, without the batch.
        shapes: of the results, likewise.
        positions: which of the arguments are the inputs; by default all.
        removed: how many dead channels its layers have lost.
    """

    def __init__(
        self,
        nodes: list[Node],
        outputs: list[int],
        input_shapes: list[tuple[int, ...]],
        shapes: list[tuple[int, ...]],
        positions: list[int] | None = None,
        removed: int = 0,
    ) -> None:
        super().__init__()
        self.nodes, self.outputs = nodes, outputs
        self.input_shapes, self.shapes = input_shapes, shapes
        self.positions = list(range(len(input_shapes))) if positions is None else positions
        self.removed = removed
        self._network = self._compile()

    def _compile(self) -> Any:
        records, lists = [n.record() for n in self.nodes], [n.lists for n in self.nodes]
        network = ops.frozen_network(records, lists, self.outputs)
        for name, forms, shapes in (
            ("inputs", network.input_shapes, self.input_shapes),
            ("outputs", network.output_shapes, self.shapes),
        ):
            if list(map(math.prod, forms)) != list(map(math.prod, shapes)):
                raise ShapeError(f"{name}: expected maps of {forms}, got shapes {shapes}")
        return network

    def forward(self, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
        inputs = [arguments[i] for i in self.positions]
        for number, x in enumerate(inputs):
            if x.dtype != torch.float32 or x.device.type != "cpu":
                raise UnsupportedError(
                    f"input {number} of a frozen network: expected float32 on the CPU, got "
                    f"{x.dtype} on {x.device}"
                )
            if x.requires_grad and torch.is_grad_enabled():
                raise UnsupportedError(
                    "a frozen network has no gradients: call it in torch.inference_mode()"
                )
        batch = len(inputs[0])
        for x, shape in zip(inputs, self.input_shapes, strict=True):
            if len(x) != batch or tuple(x.shape[1:]) != shape:
                raise ShapeError(
                    f"frozen network: expected a batch of {list(shape)}, got shape {list(x.shape)}"
                )
        results = [torch.empty((batch, *shape)) for shape in self.shapes]
        self._network.run([x.contiguous() for x in inputs], results, torch.get_num_threads())
        return results[0] if len(results) == 1 else tuple(results)

    @property
    def products(self) -> int:
        """Multiplications of the network for one image."""
        return int(self._network.products)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_network"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._network = self._compile()


def capture(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    """Return the model's graph for inputs like these, of any batch size where it can have one.

    Raises:
        UnsupportedError: torch.export cannot trace the model.
    """
    batch = [
        {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.ndim else None for x in inputs
    ]
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=tuple(batch), strict=False)
        return program.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise UnsupportedError(f"freeze: torch.export cannot trace the model: {first}") from error


def cut(graph: fx.GraphModule, batch: Any, int8: bool = False) -> fx.GraphModule:
    """Replace all that the compiled network can do by islands, in as few pieces as possible."""
    fold_constants(graph)
    fuse_attention(graph)
    fuse_sequences(graph)
    known = constants(graph)
    values = Values(Draft(), known, batch)
    supported = {node for node in graph.graph.nodes if _try(values, node)}
    layers = {
        n for n in supported if values.draft.nodes[values.maps[n]].kind in (PRODUCT, ATTENTION)
    }

    class Support(OperatorSupportBase):
        def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
            return node in supported

    partitioner = CapabilityBasedPartitioner(
        graph, Support(), allows_single_node_partition=True, non_compute_ops=_VIEWS
    )
    names = {node.name: value for node, value in known.items()}
    # Without a layer in it an island would only copy maps into its layout and back.
    worthwhile = [p for p in partitioner.propose_partitions() if any(n in layers for n in p.nodes)]
    parts = partitioner.fuse_partitions(worthwhile)
    for name, part in list(parts.named_children()):
        if name.startswith("fused_") and isinstance(part, fx.GraphModule):
            users = [n for n in parts.graph.nodes if n.op == "call_module" and n.target == name]
            setattr(parts, name, _compile(part, users[0], names, batch, int8))
    for node in parts.graph.nodes:  # results of islands are contiguous, whatever the model's were
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    parts.graph.eliminate_dead_code()
    return fx.GraphModule(parts, parts.graph)  # with what the graph still uses, and nothing else


_VIEWS = ["aten.view.default", "_operator.getitem", "aten.clone.default"]


def _try(values: Values, node: fx.Node) -> bool:
    rule = RULES.get(node.target) if node.op == "call_function" else None
    if rule is None:
        return False
    try:
        number = rule(values, node)
    except Outside:
        return False
    first = node.args[0]
    views = number == values.maps.get(first) if isinstance(first, fx.Node) else False
    values.put(node, number, first if views and isinstance(first, fx.Node) else None)
    return True


def _compile(
    part: fx.GraphModule, call: fx.Node, constants: dict[str, Tensor], batch: Any, int8: bool
) -> Island:
    """Make the island of one part; constants of the model come in as arguments."""
    placeholders = [node for node in part.graph.nodes if node.op == "placeholder"]
    arguments = dict(zip(placeholders, call.args, strict=True))
    known = {
        node: constants[source.name]
        for node, source in arguments.items()
        if isinstance(source, fx.Node) and source.name in constants
    }
    values = Values(Draft(), known, batch)
    outputs: list[fx.Node] = []
    for node in part.graph.nodes:
        if node.op == "call_function":
            if not _try(values, node):
                raise AssertionError(f"{node.target} was supported before it was part of an island")
        elif node.op == "output":
            result = node.args[0]
            outputs = list(result) if isinstance(result, tuple | list) else [result]
    inputs = [node for node in placeholders if node in values.maps]
    order = {node: number for number, node in enumerate(call.graph.nodes)}
    inputs.sort(key=lambda node: order[arguments[node]])  # as the model has them
    nodes, numbers = values.draft.finish(
        [values.maps[node] for node in inputs], [values.maps[node] for node in outputs]
    )
    positions = [placeholders.index(node) for node in inputs]
    shapes = [values.shape(node) for node in inputs], [values.shape(node) for node in outputs]
    nodes, removed = remove_dead(nodes, numbers)
    if int8:
        nodes = [rounded(node) for node in nodes]
    return Island(nodes, numbers, *shapes, positions, removed)
