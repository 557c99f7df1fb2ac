"""Layers that sparsify does not understand: it leaves them alone and names them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparsekd.nn import sparse_modules, sparsify, survey

pytestmark = pytest.mark.usefixtures("no_unexpected_warnings")


class Wider(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Other(nn.MultiheadAttention):
    pass


def special_layers() -> nn.ModuleDict:
    embedding, tied = nn.Embedding(8, 4), nn.Linear(4, 8)
    tied.weight = embedding.weight
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    pruned = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old_norm = nn.utils.weight_norm(nn.Linear(4, 4))
    return nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "attention": Other(4, 2),
            "lazy": nn.LazyLinear(4),
            "lazy_conv": nn.LazyConv2d(4, 3),
            "subclass": Wider(4, 4),
            "embedding": embedding,
            "tied": tied,
            "weight_norm": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "old_weight_norm": old_norm,
            "orthogonal": nn.utils.parametrizations.orthogonal(nn.Conv2d(4, 4, 1)),
            "pruned": pruned,
            "replaced": replaced,
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
        }
    )


LEFT_ALONE = {
    "attention.out_proj": "NonDynamicallyQuantizableLinear",
    "lazy": "LazyLinear",
    "lazy_conv": "LazyConv2d",
    "subclass": "Wider",
    "tied": "shared",
    "weight_norm": "ParametrizedLinear",
    "old_weight_norm": "computed",
    "orthogonal": "ParametrizedConv2d",
    "pruned": "computed",
    "replaced": "forward has been replaced",
    "complex": "complex64",
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_not_understood_is_left_alone_and_reported():
    model = special_layers()
    classes = {name: type(module) for name, module in model.named_modules()}
    with pytest.warns(UserWarning, match="leaves these layers dense") as caught:
        sparsify(model, 0.5)
    assert {n: m.topology.nnz for n, m in sparse_modules(model)} == {"plain": 8}
    assert caught[0].filename == __file__
    lines = str(caught[0].message).split("\n")[1:]
    named = LEFT_ALONE | {"attention.in_proj_weight": "an Other is not converted"}
    assert [line.strip().split(":")[0] for line in lines] == list(named)
    for line, reason in zip(lines, named.values(), strict=True):
        assert reason in line
    for name, module in model.named_modules():
        assert name == "plain" or type(module) is classes[name]
    found = survey(model)
    assert not found.convertible
    assert list(found.left_alone) == list(LEFT_ALONE)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_skipping_what_is_left_alone_silences_the_warning():
    sparsify(special_layers(), skip=[*LEFT_ALONE, "attention.in_proj_weight"])
    sparsify(special_layers(), skip=[*LEFT_ALONE, "attention"])


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_mask_for_what_is_left_alone_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"masks: 'tied' is no layer.*shared with another module"):
        sparsify(special_layers(), masks={"tied": torch.ones(8, 4, dtype=torch.bool)})
