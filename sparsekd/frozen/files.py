"""Frozen networks as files: safetensors with the nodes' numbers beside their lists."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, fx, nn

from sparsekd.errors import CheckpointError, ShapeError, TopologyError, UnsupportedError
from sparsekd.frozen.draft import Node
from sparsekd.frozen.islands import Island
from sparsekd.frozen.module import FrozenModule
from sparsekd.train.checkpoint import state_hash, write_atomic

_FORMAT = "sparsekd frozen 1"
_LISTS = {
    "crow": (torch.int32,),
    "col": (torch.int32, torch.int16),  # narrow where all columns fit
    "values": (torch.float32, torch.int8),
    "bias": (torch.float32,),
    "scale": (torch.float32,),
}


def save_frozen(module: FrozenModule, path: str | os.PathLike[str]) -> None:
    """Save a frozen network, for the inputs that it was prepared for last, atomically.

    The file holds tensors and numbers and no code: `load_frozen` reads it without the model's
    class, and `csrc/include/sparsekd.h` without Python.

    Args:
        module: what `skd.freeze(model, example)` returned.
        path: of the file.

    Raises:
        UnsupportedError: some operators run in torch, the model returns more than one
            tensor, or it has an input that it does not read.

    Example:
        >>> import tempfile
        >>> frozen = sparsekd.freeze(nn.Linear(4, 2), torch.zeros(1, 4))  # doctest: +SKIP
        >>> save_frozen(frozen, tempfile.mkdtemp() + "/linear.frozen")  # doctest: +SKIP
    """
    if module.outside:
        raise UnsupportedError(
            f"save_frozen: these operators run in torch, which a file cannot hold: "
            f"{', '.join(sorted(set(module.outside)))}"
        )
    islands = module.islands
    if len(islands) != 1 or len(islands[0].shapes) != 1:
        raise UnsupportedError("save_frozen: expected a model that returns one tensor")
    island = islands[0]
    if len(island.input_shapes) != module.arguments:
        raise UnsupportedError("save_frozen: expected a model that reads all of its inputs")
    tensors = {
        "records": torch.tensor([node.record() for node in island.nodes], dtype=torch.int32),
        "outputs": torch.tensor(island.outputs, dtype=torch.int32),
    }
    for number, node in enumerate(island.nodes):
        for name, values in node.lists.items():
            narrow = name == "col" and (values < 1 << 15).all()
            tensors[f"{number}.{name}"] = (values.short() if narrow else values).contiguous()
    # One entry only: safetensors writes several in an order that differs between processes.
    about = {
        "format": _FORMAT,
        "inputs": [list(shape) for shape in island.input_shapes],
        "output": list(island.shapes[0]),
        "sha256": state_hash(tensors),
    }
    write_atomic(path, save(tensors, {"sparsekd": json.dumps(about, sort_keys=True)}))


def load_frozen(path: str | os.PathLike[str]) -> FrozenModule:
    """Load what `save_frozen` wrote.

    Everything in the file is checked before it is used, so that it may come from anywhere.

    Raises:
        CheckpointError: the file is missing, damaged, or another kind of file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("sparsekd", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: expected a file of save_frozen ({_FORMAT})")
    if about.get("sha256") != state_hash(tensors):
        raise CheckpointError(f"{path}: damaged, its tensors do not match the stored SHA-256")
    try:
        nodes, outputs = _nodes(tensors)
        inputs = [_shape(shape) for shape in about["inputs"]]
        island = Island(nodes, outputs, inputs, [_shape(about["output"])])
    except (KeyError, TypeError, ValueError, RuntimeError, UnsupportedError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return _module(island)


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        raise ShapeError(f"expected a shape, got {sizes!r}")
    return tuple(sizes)


def _nodes(tensors: dict[str, Tensor]) -> tuple[list[Node], list[int]]:
    records, outputs = tensors["records"], tensors["outputs"]
    for name, value, axes in (("records", records, 2), ("outputs", outputs, 1)):
        if value.dtype != torch.int32 or value.ndim != axes:
            raise ShapeError(f"{name}: expected int32 of {axes} axes")
    nodes = [Node.of_record(record) for record in records.tolist()]
    numbers = {str(number): number for number in range(len(nodes))}
    for key, value in tensors.items():
        if key in ("records", "outputs"):
            continue
        number, _, name = key.partition(".")
        if name not in _LISTS or number not in numbers:
            raise ShapeError(f"{key}: not a tensor of a frozen network")
        if value.dtype not in _LISTS[name] or value.ndim != 1:
            expected = " or ".join(map(str, _LISTS[name]))
            raise TopologyError(f"{key}: expected one axis of {expected}, got {value.dtype}")
        nodes[numbers[number]].lists[name] = value.int() if name == "col" else value
    return nodes, outputs.tolist()


def _module(island: Island) -> FrozenModule:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"input_{i}") for i in range(len(island.input_shapes))]
    graph.output(graph.call_module("island", tuple(inputs)))
    module = FrozenModule(None)
    key = tuple((shape, torch.float32) for shape in island.input_shapes)
    module.keep(key, fx.GraphModule(nn.ModuleDict({"island": island}), graph))
    return module
