"""What depends on no input of an exported graph, computed once."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor, fx

from sparsekd import _torch

aten = torch.ops.aten


def constants(graph: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Return the tensors of the model by their nodes, but for those that the model writes to."""
    nodes = graph.graph.nodes
    writers = [node for node in nodes if _torch.writes(node.target)]
    written = {operand.target for node in writers for operand in node.all_input_nodes}
    found = {}
    for node in nodes:
        if node.op == "get_attr" and node.target not in written:
            value = attrgetter(node.target)(graph)
            if isinstance(value, Tensor):
                found[node] = value.detach()
    return found


def fold_constants(graph: fx.GraphModule) -> None:
    """Put buffers where a graph has operators of which all operands are known, in place.

    Repetitions stay: they take no time, and are often for every image of a batch.
    """
    known = constants(graph)
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.target in (aten.expand.default, aten.repeat.default) or _torch.writes(node.target):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if any(operand not in known for operand in node.all_input_nodes):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        name = f"_folded_{node.name}"
        graph.register_buffer(name, node.target(*args, **kwargs).detach(), persistent=False)
        with graph.graph.inserting_before(node):
            folded = graph.graph.get_attr(name)
        folded.meta = dict(node.meta)
        known[folded] = getattr(graph, name)
        node.replace_all_uses_with(folded)
    graph.graph.eliminate_dead_code()
    graph.recompile()
