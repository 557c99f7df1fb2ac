"""What depends on no input of an exported graph, computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """Return the tensor of the model that a node stands for, if it stands for one."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value.detach() if isinstance(value, Tensor) else None


def fold_constants(graph: fx.GraphModule) -> None:
    """Put buffers where a graph has operators of which all operands are known, in place.

    Repetitions stay: they take no time, and are often for every image of a batch.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.target in (aten.expand.default, aten.repeat.default):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        known = {operand: constant(graph, operand) for operand in node.all_input_nodes}
        if any(value is None for value in known.values()):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        name = f"_folded_{node.name}"
        graph.register_buffer(name, node.target(*args, **kwargs).detach(), persistent=False)
        with graph.graph.inserting_before(node):
            folded = graph.graph.get_attr(name)
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
    graph.graph.eliminate_dead_code()
    graph.recompile()
