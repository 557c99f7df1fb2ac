"""Attention in an exported graph: reshapes, transposes and the product made one operator again.

Models write it in many ways. What they have in common is torch's scaled_dot_product_attention on
queries, keys and values that are tokens [batch, tokens, channels], the channels split into heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsekd.frozen.constants import constants
from sparsekd.frozen.patterns import COPIES, VIEWS, order_of, shape_of, without_copies

aten = torch.ops.aten


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Attend to tokens [batch, tokens, channels], all operands and the result alike.

    The mask is added to the scores: [batch, 1 or heads, 1 or queries, keys], or None.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def packed_attention(qkv: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """The same, with queries, keys and values behind each other in the channels of one tensor."""
    q, k, v = qkv.chunk(3, -1)
    return attention(q, k, v, heads, mask)


def fuse_attention(graph: fx.GraphModule) -> None:
    """Put `attention` or `packed_attention` where a graph has it written out, in place."""
    known = constants(graph)
    for node in list(graph.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _fuse(graph.graph, node, known)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _fuse(graph: fx.Graph, node: fx.Node, known: Mapping[fx.Node, Tensor]) -> None:
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    settings: dict[str, Any] = {**dict(zip(names, node.args[3:], strict=False)), **node.kwargs}
    scale, usual = settings.pop("scale", None), shape_of(node)[-1]
    mask = settings.pop("attn_mask", None)
    if mask is not None and _blocks_nothing(mask, known):
        mask = None
    if any(settings.values()):  # dropout, causal, fewer keys than queries
        return
    if scale is not None and not (
        isinstance(usual, int) and math.isclose(scale, usual**-0.5, rel_tol=1e-6)
    ):
        return
    sources = [_source(x) for x in node.args[:3]]
    result = _result(node)
    heads = shape_of(node)[1]
    if result is None or None in sources or not isinstance(heads, int):
        return
    bases = [source[0] for source in sources if source]
    with graph.inserting_before(result):
        if mask is not None:
            mask = _added(graph, mask)
        if all(source and source[1] is None for source in sources):
            fused = graph.call_function(attention, (*bases, heads, mask))
        elif [source and source[1] for source in sources] == [0, 1, 2] and len(set(bases)) == 1:
            fused = graph.call_function(packed_attention, (bases[0], heads, mask))
        else:
            return
    fused.meta = dict(result.meta)
    result.replace_all_uses_with(fused)
    # torch counts the product among the operators with a random state, which nobody else removes.
    dead: Any = result
    while isinstance(dead, fx.Node) and not dead.users:
        before = None if dead is node else dead.args[0]
        graph.erase_node(dead)
        dead = before


def _blocks_nothing(mask: fx.Node, known: Mapping[fx.Node, Tensor]) -> bool:
    while mask.target in COPIES or mask.target is aten.expand.default:
        mask = mask.args[0]  # type: ignore[assignment]
    value = known.get(mask)
    if value is None:
        return False
    return bool(value.all()) if value.dtype == torch.bool else not value.any()


def _added(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """Return a mask as numbers to add, without copies for every query or head."""
    while mask.target in COPIES or mask.target is aten.expand.default:
        before = mask.args[0]
        if not isinstance(before, fx.Node) or shape_of(before)[:1] != shape_of(mask)[:1]:
            break
        if len(shape_of(before)) != 4:
            break
        mask = before
    value = mask.meta["val"]
    if value.dtype != torch.bool:
        return mask
    added = graph.call_function(aten.where.Scalar, (mask, 0.0, -math.inf))
    added.meta = {**mask.meta, "val": torch.where(value, 0.0, -math.inf)}
    return added


def _axes(node: fx.Node) -> tuple[int, ...]:
    found = order_of(node)
    return found[1] if found else ()


def _source(node: Any) -> tuple[fx.Node, int | None] | None:
    """Return the tokens that queries, keys or values are, and which third of their channels."""
    node = without_copies(node)
    if isinstance(node, fx.Node) and node.target is torch.ops.aten.select.int:
        packed, axis, third = node.args[0], node.args[1], node.args[2]
    elif isinstance(node, fx.Node) and getattr(node.target, "__name__", "") == "getitem":
        unbound, third = node.args
        if not isinstance(unbound, fx.Node) or unbound.target is not aten.unbind.int:
            return None
        packed, axis = unbound.args[0], (*unbound.args[1:], 0)[0]
    else:
        found = order_of(node)
        if found is None or found[1] != (0, 2, 1, 3):
            return None
        return _tokens(found[0], 4, None)
    found = order_of(packed)  # [3, batch, heads, tokens, width]
    if axis != 0 or found is None or found[1] != (2, 0, 3, 1, 4) or not isinstance(third, int):
        return None
    return _tokens(found[0], 5, third)


def _tokens(view: Any, rank: int, third: int | None) -> tuple[fx.Node, int | None] | None:
    view = without_copies(view)
    if not isinstance(view, fx.Node) or view.target not in VIEWS or len(shape_of(view)) != rank:
        return None
    base, split = view.args[0], shape_of(view)
    if rank == 5 and split[2] != 3:
        return None
    if not isinstance(base, fx.Node) or len(shape_of(base)) != 3 or shape_of(base)[:2] != split[:2]:
        return None
    return base, third


def _result(node: fx.Node) -> fx.Node | None:
    """Return the tokens that all of the result goes into."""
    steps: list[fx.Node] = [node]
    while True:
        users = list(steps[-1].users)
        if len(users) != 1:
            return None
        user = users[0]
        same = user.target in VIEWS and shape_of(user) == shape_of(steps[-1])
        if same or user.target in COPIES or _axes(user) == (0, 2, 1, 3):
            steps.append(user)
        elif user.target in VIEWS and len(shape_of(user)) == 3:
            turned = any(_axes(step) for step in steps[1:] if step.target not in COPIES)
            return user if turned and shape_of(user)[:2] == shape_of(steps[-1])[:2] else None
        else:
            return None
