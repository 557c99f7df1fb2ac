"""Folders as the Hugging Face hub has them: sparse models of transformers, saved and loaded.

On their way through the loader of transformers, which knows no sparse layers, weights are dense,
with NaN where nothing is stored. So whatever it does to names, prefixes and dtypes also happens to
the masks.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import sparsekd.nn as sparse
from sparsekd.diagnose import coverage, flops
from sparsekd.errors import CheckpointError, UnsupportedError
from sparsekd.nn.stored import INDICES, scatter_dense
from sparsekd.sparsity import survey
from sparsekd.sparsity.packed import SplitModule
from sparsekd.topology import Topology

STRUCTURE = "sparsekd.json"
"""Name of the file that has, per sparse layer, what tensors do not say: class, shape, layout."""

_FORMAT = 1
_WEIGHTS = "model.safetensors"


def save_pretrained(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    inputs: Mapping[str, Any] | None = None,
    method: str = "",
    **options: Any,
) -> None:
    """Save a model of transformers with its sparse layers, so that `from_pretrained` gives it back.

    The folder has what the model's own `save_pretrained` writes (config, safetensors, in shards if
    they are large), the structure of the sparse layers, and a model card, unless there is one.

    Args:
        model: a PreTrainedModel, after `sparsekd.sparsify`.
        folder: to write to; it is made if it does not exist.
        inputs: keyword arguments of one forward pass; the card then has its FLOPs.
        method: how the model was made sparse, in words, for the card.
        options: passed on to the model's `save_pretrained`, as `max_shard_size`.

    Raises:
        ValueError: the model has no sparse layer.
        UnsupportedError: a stored weight is NaN.

    Example:
        >>> save_pretrained(model, "bert-sparse", method="RigL")  # doctest: +SKIP
    """
    layers = dict(sparse.sparse_modules(model))
    if not layers:
        raise ValueError("model: expected one with sparse layers; call skd.sparsify(model) first")
    for name, layer in layers.items():
        if layer.values.isnan().any():
            raise UnsupportedError(f"{name}.values: has NaN, which a checkpoint cannot keep here")
    # Under the names of the modules, which the structure has too, not those of older versions.
    model.save_pretrained(folder, save_original_format=False, **options)
    rows = {
        name: {
            "class": type(layer).__name__,
            "shape": list(layer.weight_shape),
            "layout": str(layer.layout),
            "asked_sparsity": layer.asked_sparsity,
        }
        for name, layer in layers.items()
    }
    split = [n for n, m in model.named_modules() if isinstance(m, SplitModule)]
    text = json.dumps({"format": _FORMAT, "layers": rows, "split": split}, indent=1)
    (Path(folder) / STRUCTURE).write_text(text + "\n")
    card = Path(folder) / "README.md"
    if not card.exists():
        card.write_text(model_card(model, inputs=inputs, method=method))


def from_pretrained(kind: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model that `save_pretrained` wrote: the same layers, bit for bit.

    The dense weights exist for the time of loading.

    Args:
        kind: a class of transformers, as BertForSequenceClassification, or of its Auto classes.
        folder: a folder on this machine; `huggingface_hub.snapshot_download` makes one of a
            repository.
        options: passed on to the class's `from_pretrained`, as `dtype`.

    Returns:
        The model, in evaluation mode as transformers returns it.

    Raises:
        CheckpointError: a file is missing or damaged, or a sparse weight has no layer in the model.

    Example:
        >>> from transformers import AutoModelForCausalLM  # doctest: +SKIP
        >>> from_pretrained(AutoModelForCausalLM, "gpt2-sparse")  # doctest: +SKIP
    """
    folder = Path(folder)
    (rows, split), state = _structure(folder), _tensors(folder)
    for name, row in rows.items():
        state[f"{name}.weight"] = _with_holes(name, row, state)
    model = _load_dense(kind, folder, state, split, options)
    _make_sparse(model, rows)
    return model


def model_card(
    model: nn.Module, *, inputs: Mapping[str, Any] | None = None, method: str = ""
) -> str:
    """Write a model card, in Markdown with the header that the hub reads.

    Args:
        model: with sparse layers.
        inputs: keyword arguments of one forward pass, to count its FLOPs; None leaves them out.
        method: how the model was made sparse.

    Example:
        >>> import sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5)
        >>> print(model_card(layer, method="RigL"), end="")
        ---
        library_name: sparsekd
        tags: [sparsekd, sparse]
        ---
        # SparseLinear with sparse weights
        <BLANKLINE>
        | | |
        |---|---|
        | method | RigL |
        | sparsity of the converted weights | 0.5 |
        | sparsity of the whole model | 0.4444 |
        | weights stored | 16 of 32 in 1 layer |
        <BLANKLINE>
        Load it with sparsekd, which computes with the stored weights only:
        <BLANKLINE>
            from sparsekd.integrations.huggingface import from_pretrained
            from transformers import SparseLinear
            model = from_pretrained(SparseLinear, folder)
    """
    found, kind = coverage(model), type(model).__name__
    count = sum(1 for _ in sparse.sparse_modules(model))
    rows = {
        "method": method or "not told",
        "sparsity of the converted weights": f"{found.converted:.4g}",
        "sparsity of the whole model": f"{found.whole:.4g}",
        "weights stored": f"{found.nnz} of {found.numel} in {count} layer{'s' * (count != 1)}",
    }
    if inputs is not None:
        cost = flops.count(model, **inputs)
        share = cost.forward / cost.forward_dense
        rows["FLOPs of a forward pass"] = f"{cost.forward}, {share:.1%} of the dense model's"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: sparsekd
tags: [sparsekd, sparse]
---
# {kind} with sparse weights

| | |
|---|---|
{table}

Load it with sparsekd, which computes with the stored weights only:

    from sparsekd.integrations.huggingface import from_pretrained
    from transformers import {kind}
    model = from_pretrained({kind}, folder)
"""


def _structure(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Read the rows of the sparse layers, and the names of modules whose weights were packed."""
    path = folder / STRUCTURE
    try:
        content = json.loads(path.read_text())
        known, rows = content["format"] == _FORMAT, content["layers"]
        split = [str(name) for name in content.get("split", [])]
        if not known:
            raise CheckpointError(f"{path}: expected format {_FORMAT}, got {content['format']!r}")
        for row in rows.values():
            if not issubclass(getattr(sparse, row["class"]), sparse.SparseModule):
                raise TypeError(row["class"])
            row["shape"] = [int(size) for size in row["shape"]]
            row["layout"] = str(row["layout"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a structure of sparsekd: {error!r}") from error
    return rows, split


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Read the weights, from one file or from shards."""
    index = folder / f"{_WEIGHTS}.index.json"
    try:
        shards = {_WEIGHTS}
        if index.exists():
            shards = set(json.loads(index.read_text())["weight_map"].values())
        state: dict[str, Tensor] = {}
        for shard in sorted(shards):
            if Path(shard).name != shard:
                raise ValueError(f"{shard!r} is no name of a file in this folder")
            with safe_open(folder / shard, framework="pt") as file:
                state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read: {error}") from error
    return state


def _with_holes(name: str, row: Mapping[str, Any], state: dict[str, Tensor]) -> Tensor:
    """Take a layer's tensors out of `state`; return its dense weight, NaN where nothing is."""
    missing = [key for key in ("values", *INDICES) if f"{name}.{key}" not in state]
    if missing:
        raise CheckpointError(f"{name}: expected its tensors, but {', '.join(missing)} is missing")
    values, crow, col = (state.pop(f"{name}.{key}") for key in ("values", *INDICES))
    try:
        topology = Topology(crow, col, row["shape"])
    except ValueError as error:  # what TopologyError is
        raise CheckpointError(f"{name}: {error}") from error
    if values.shape != (topology.nnz,) or values.isnan().any():
        raise CheckpointError(f"{name}.values: expected {topology.nnz} numbers, none of them NaN")
    flat, shape = topology.flat_indices(), row["shape"]
    weight = scatter_dense(values, flat, shape)
    stored = scatter_dense(torch.ones_like(values, dtype=torch.bool), flat, shape)
    return getattr(sparse, row["class"])._turned(weight.masked_fill_(~stored, float("nan")))


def _load_dense(
    kind: Any, folder: Path, state: dict[str, Tensor], split: list[str], options: dict[str, Any]
) -> Any:
    from transformers import AutoConfig, GenerationConfig

    options = {"config": AutoConfig.from_pretrained(folder), **options}
    auto = not hasattr(kind, "config_class")  # an Auto class asks the config for the class
    if auto or split:
        empty = _on_meta(kind.from_config if auto else kind, options["config"])
        kind = type(empty)
        _pack(state, split, empty)
    model = kind.from_pretrained(None, state_dict=state, **options)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _around_trunk(
    prefix: str, rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Return the rows under the names in a model without the head, and in one with a head."""
    trunk = {name.removeprefix(f"{prefix}."): row for name, row in rows.items()}
    return trunk | {f"{prefix}.{name}": row for name, row in trunk.items()}


def _on_meta(make: Any, config: Any) -> Any:
    with torch.device("meta"):
        return make(config)


def _pack(state: dict[str, Tensor], split: list[str], empty: Any) -> None:
    """Pack weights as the dense model has them; names with or without the head's are the same."""
    trunk = f"{empty.base_model_prefix}."
    found = {module: name for name, module in empty.named_modules()}
    modules = {found[dense].removeprefix(trunk): s for dense, s in survey(empty).splits.items()}
    for name in split:
        if name.removeprefix(trunk) not in modules:
            raise CheckpointError(f"{name}: sparse in the checkpoint, but no such module here")
        modules[name.removeprefix(trunk)].pack_state_(state, f"{name}.")


def _make_sparse(model: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Turn layers with holes in their weights to sparse ones, and those noted to be sparse."""
    rows = {**rows, **_around_trunk(model.base_model_prefix, rows)}
    found = survey(model).convertible
    weights = {name: layer.get_parameter("weight").detach() for name, layer in found.items()}
    masks = {
        name: ~weight.isnan()
        for name, weight in weights.items()
        if name in rows or weight.isnan().any()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what sparsify said when the model was made sparse
        if masks:
            sparse.sparsify(model, masks=masks)
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.isnan().any()
    ]
    if lost:
        raise CheckpointError(
            f"{', '.join(lost)}: sparse in the checkpoint, but no layer of its own"
        )
    for name, layer in sparse.sparse_modules(model):
        if name in rows:
            sparse.relayout(layer, rows[name]["layout"])
            layer.asked_sparsity = rows[name]["asked_sparsity"]
