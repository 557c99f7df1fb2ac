"""What stays dense is named, and how sparse the whole model is can be asked."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsekd as skd
from sparsekd.diagnose.coverage import Coverage

pytestmark = pytest.mark.filterwarnings("ignore:no weight is left")


class Conv1D(nn.Module):
    """The transposed linear layer of GPT-2."""

    def __init__(self, out: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 32))
        self.scale = nn.Parameter(torch.ones(16))


class Attention(nn.MultiheadAttention):
    pass


DENSE = {
    "conv1d": (type("Causal", (nn.Conv1d,), {})(8, 8, 3), [""]),
    "conv3d": (nn.Conv3d(4, 4, 3), ["weight"]),
    "transposed": (nn.ConvTranspose2d(8, 8, 3), ["weight"]),
    "lstm": (nn.LSTM(8, 8), ["weight_ih_l0", "weight_hh_l0"]),
    "cell": (nn.GRUCell(8, 8), ["weight_ih", "weight_hh"]),
    "bilinear": (nn.Bilinear(4, 5, 6), ["weight"]),
    "embedding": (nn.Embedding(30, 8), ["weight"]),
    "bag": (nn.EmbeddingBag(30, 8), ["weight"]),
    "attention": (Attention(8, 2), ["in_proj_weight", "out_proj"]),
    "cross": (
        Attention(8, 2, kdim=4, vdim=4),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"],
    ),
    "gpt": (Conv1D(16, 8), ["weight"]),
    "experts": (Experts(), ["up"]),
    "subclass": (type("Wider", (nn.Linear,), {})(8, 8), [""]),
}


def caught(call) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    texts = [str(w.message) for w in found if "leaves these layers dense" in str(w.message)]
    assert all(
        w.filename == __file__ for w in found if "leaves these layers dense" in str(w.message)
    )
    return texts


def model_with(kind: str) -> nn.ModuleDict:
    return nn.ModuleDict({"plain": nn.Linear(30, 30), "odd": copy.deepcopy(DENSE[kind][0])})


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", DENSE)
def test_what_is_not_converted_is_named_with_its_share(kind, given):
    model = model_with(kind)
    total = sum(p.numel() for p in model.parameters())
    masks = {"plain": torch.ones(30, 30, dtype=torch.bool)} if given else None
    (text,) = caught(lambda: skd.sparsify(model, masks=masks))
    named = {line.split(":")[0].strip(): line.rpartition("(")[2] for line in text.split("\n")[1:]}
    assert sorted(named) == sorted(f"odd.{leaf}".rstrip(".") for leaf in DENSE[kind][1])
    for name, share in named.items():
        weight = model.get_submodule(name).weight if name.endswith(("proj", "odd")) else None
        weight = model.get_parameter(name) if weight is None else weight
        assert share == f"{weight.numel() / total:.1%})"


@pytest.mark.parametrize("kind", DENSE)
def test_skip_silences_by_module_and_by_parameter(kind):
    leaves = [f"odd.{leaf}".rstrip(".") for leaf in DENSE[kind][1]]
    assert not caught(lambda: skd.sparsify(model_with(kind), skip="odd"))
    assert not caught(lambda: skd.sparsify(model_with(kind), skip=leaves))
    assert not caught(lambda: skd.sparsify(model_with(kind), skip=["odd*"]))
    with pytest.raises(ValueError, match="'even' matches no layer"):
        skd.sparsify(model_with(kind), skip=["odd", "even"])


def test_small_parameters_are_not_named():
    model = nn.ModuleDict({"big": nn.Linear(100, 100), "token": nn.Embedding(1, 50)})
    assert not caught(lambda: skd.sparsify(model))


def test_tied_weights_are_named_once_and_silenced_by_either_name():
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"wte": nn.Embedding(20, 10), "fc": nn.Linear(10, 10)})
        model["head"] = nn.Linear(10, 20, bias=False)
        model["head"].weight = model["wte"].weight
        return model

    (text,) = caught(lambda: skd.sparsify(tied()))
    assert text.count("\n") == 1
    assert "head: its weight is shared" in text
    assert not caught(lambda: skd.sparsify(tied(), skip="wte"))
    assert not caught(lambda: skd.sparsify(tied(), skip="head"))
    model = skd.sparsify(tied(), 0.5, skip="wte")
    assert skd.coverage(model).whole == pytest.approx(50 / (200 + 110))


def test_coverage_of_a_vision_transformer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 10))
    total = sum(p.numel() for p in model.parameters())
    found = skd.coverage(skd.sparsify(model, 0.9, skip="*.self_attn"))
    assert isinstance(found, Coverage)
    converted = 2 * 2 * 32 * 64 + 320
    zeros = converted - round(0.1 * converted)
    assert (found.asked, found.numel, found.total) == (0.9, converted, total)
    assert found.converted == zeros / converted
    assert found.whole == zeros / total
    assert [part.name for part in found.dense[:2]] == [
        "0.layers.0.self_attn.in_proj_weight",
        "0.layers.1.self_attn.in_proj_weight",
    ]
    assert found.dense[0].share == 3 * 32 * 32 / total
    assert f"{found.whole:.4g} over the whole model" in str(found)
    assert "in_proj_weight" in str(found)
    assert skd.coverage(copy.deepcopy(model)).asked == 0.9


def test_coverage_of_models_that_were_asked_for_nothing():
    dense = skd.coverage(nn.Linear(3, 2))
    assert (dense.asked, dense.converted, dense.whole, dense.total) == (None, 0, 0, 8)
    assert [part.name for part in dense.dense] == ["weight"]
    assert skd.coverage(nn.Sequential()).whole == 0
    masks = {"0": torch.eye(4, dtype=torch.bool)}
    given = skd.coverage(skd.sparsify(nn.Sequential(nn.Linear(4, 4)), masks=masks))
    assert (given.asked, given.converted) == (None, 0.75)
    assert skd.coverage(skd.nn.SparseLinear(10, 10, bias=False, sparsity=0.8)).whole == 0.8


def test_coverage_after_pruning_tells_what_was_asked_of_the_method():
    model = skd.sparsify(nn.Sequential(nn.Linear(20, 20, bias=False)), sparsity=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gmp = skd.dst.GMP(model, optimizer, sparsity=0.9, every=1, until=2)
    assert [gmp.step() for _ in range(2)] == [True, True]
    found = skd.coverage(model)
    assert (found.asked, found.converted, found.whole) == (0.9, 0.9, 0.9)


def test_explain_shows_coverage():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Conv1D(8, 16))
    skd.sparsify(model, 0.5, skip="2")
    found = skd.explain(model, (4, 16))
    assert found.coverage.whole == skd.coverage(model).whole
    assert f"{found.coverage.whole:.4g} over the whole model" in str(found)
    assert "2.weight" in str(found)


def test_a_model_without_convertible_layers_says_what_it_has():
    model = nn.Sequential(Conv1D(16, 8), nn.ReLU(), Conv1D(8, 16))
    with pytest.raises(ValueError, match=r"found none; 0\.weight: a Conv1D is not converted"):
        skd.sparsify(model)
