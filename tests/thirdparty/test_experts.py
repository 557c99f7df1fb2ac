"""Experts of transformers, whose weights have three dimensions, as lists of sparse layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekd as skd
from sparsekd.integrations import huggingface
from sparsekd.nn import SplitExperts, sparse_modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:sparsify leaves", "ignore:no weight is left"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
IDS = torch.tensor([[5, 3, 11, 2, 7, 1], [4, 4, 9, 12, 0, 0]])
SMALL = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "num_experts_per_tok": 2,
    "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {**SMALL, "intermediate_size": 24, "num_local_experts": 4},
    "GptOss": {**SMALL, "intermediate_size": 24, "num_local_experts": 4, "head_dim": 8},
    "Qwen3Moe": {**SMALL, "moe_intermediate_size": 24, "num_experts": 5, "head_dim": 8},
}


@pytest.fixture(params=MODELS)
def dense(request: pytest.FixtureRequest, transformers: Any) -> Any:
    """Return a model in float64, all of whose parameters are drawn, biases included."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**MODELS[request.param])
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def experts(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_numbers_and_gradients_are_those_of_the_masked_dense_model(dense):
    model = skd.sparsify(copy.deepcopy(dense), sparsity=0.7)
    split = experts(model)
    assert type(split) is SplitExperts
    assert len(split.down_proj) == split.num_experts
    twin = skd.densify(copy.deepcopy(model))
    assert type(experts(twin)) is type(experts(dense))
    assert list(twin.state_dict()) == list(dense.state_dict())
    found, expected = (each(IDS, labels=IDS) for each in (model, twin))
    close(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    packed = dict(experts(twin).named_parameters())
    for part in split.parts:
        layer = split.get_submodule(part.layer)
        grad = part.weight.of(packed[part.weight.path].grad)
        close(layer.values.grad, grad[layer.topology.mask()])
        if part.bias is not None:
            close(layer.bias.grad, part.bias.of(packed[part.bias.path].grad))
    with torch.no_grad():  # experts without a token are left out
        close(model.eval()(IDS).logits, twin.eval()(IDS).logits)


def test_float32_is_within_1e_5(dense):
    model = skd.sparsify(copy.deepcopy(dense), sparsity=0.7)
    split, twin = experts(model), experts(skd.densify(copy.deepcopy(model)))
    x = torch.randn(9, 32)
    chosen, weights = torch.randint(4, (9, 2)), torch.rand(9, 2)
    expected = twin(x.double(), chosen, weights.double())
    scale = expected.abs().max()
    error = (split.float()(x, chosen, weights) - expected).abs().max() / scale
    assert error < 1e-5


@pytest.mark.parametrize("method", ["RigL", "SET"])
def test_growth(dense, method):
    model = skd.sparsify(dense, sparsity=0.7)
    before = {name: layer.topology for name, layer in sparse_modules(model)}
    twin = skd.densify(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    updater = getattr(skd.dst, method)(model, optimizer, drop_fraction=0.3, every=1, until=9)
    for each in (model, twin):
        each(IDS, labels=IDS).loss.backward()
    assert updater.step()
    split, packed = experts(model), dict(experts(twin).named_parameters())
    for part in split.parts:
        old = before[f"model.layers.0.mlp.experts.{part.layer}"].mask()
        new = split.get_submodule(part.layer).topology.mask()
        grown, free = new & ~old, ~(new | old)
        assert new.sum() == old.sum()
        assert grown.any()
        if method == "RigL":
            grad = part.weight.of(packed[part.weight.path].grad).abs()
            assert grad[grown].min() >= grad[free].max() * (1 - 1e-9)


def test_checkpoints_nonzero_masks_and_flops(dense):
    model = skd.sparsify(copy.deepcopy(dense), sparsity=0.7).eval()
    twin = skd.densify(copy.deepcopy(model))
    again = skd.sparsify(copy.deepcopy(twin), masks="nonzero")
    for (name, one), (other_name, other) in zip(
        sparse_modules(model), sparse_modules(again), strict=True
    ):
        assert name == other_name
        assert one.topology == other.topology
    other = skd.sparsify(copy.deepcopy(dense), sparsity=0.7, seed=1).eval()
    other.load_state_dict(model.state_dict())
    close(other(IDS).logits, model(IDS).logits)
    other.load_state_dict(dense.state_dict())
    part = experts(other).parts[0]
    layer, whole = experts(other).get_submodule(part.layer), dict(experts(dense).named_parameters())
    weight = part.weight.of(whole[part.weight.path])
    assert torch.equal(layer.values, weight[layer.topology.mask()])
    found, expected = (skd.flops.count(each, input_ids=IDS) for each in (model, twin))
    assert found.forward_dense == expected.forward
    assert found.forward < expected.forward


def test_skip_names_experts_and_one_of_them(dense):
    model = skd.sparsify(dense, sparsity=0.7, skip=["*.1.mlp.experts", "*experts.down_proj.2"])
    assert type(model.model.layers[1].mlp.experts) is not SplitExperts
    names = {name for name, _ in sparse_modules(model) if "layers.0.mlp.experts" in name}
    assert "model.layers.0.mlp.experts.down_proj.1" in names
    assert "model.layers.0.mlp.experts.down_proj.2" not in names
    model(IDS, labels=IDS).loss.backward()


def test_a_folder_of_the_hub_gives_the_same_model(dense, tmp_path: Path):
    model = skd.sparsify(dense, sparsity=0.7).eval()
    huggingface.save_pretrained(model, tmp_path, max_shard_size="40KB")
    other = huggingface.from_pretrained(type(model), tmp_path, dtype=torch.float64)
    assert type(experts(other)) is SplitExperts
    assert {n for n, _ in sparse_modules(other)} == {n for n, _ in sparse_modules(model)}
    other.config._experts_implementation = "eager"
    assert torch.equal(other(IDS).logits, model(IDS).logits)
