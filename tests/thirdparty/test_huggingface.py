"""Sparse models of transformers go to a folder as the hub has it, and come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsekd as skd
from sparsekd.errors import CheckpointError
from sparsekd.integrations import huggingface

pytestmark = [
    pytest.mark.filterwarnings("ignore:sparsify leaves"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of channels without a weight
]

IDS = torch.tensor([[5, 3, 11, 2, 7, 1], [4, 4, 9, 12, 0, 0]])
SMALL = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertForSequenceClassification", {**SMALL, "num_labels": 3}),
    "GPT2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2,
            "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "ViT": (
        "ViTForImageClassification",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "image_size": 32, "patch_size": 8, "num_labels": 10,
        },
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2,
            "num_heads": 2, "decoder_start_token_id": 0,
        },
    ),
    "Llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}),
}  # fmt: skip


def inputs_of(name: str) -> dict[str, Any]:
    if name == "ViT":
        return {
            "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        }
    return {"input_ids": IDS} | ({"labels": IDS} if name == "T5" else {})


def build(transformers: Any, name: str, **options: Any) -> tuple[Any, Any]:
    """Return a class and a sparse model of it, some of whose layers store every weight."""
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    kind = getattr(transformers, kind)
    return kind, skd.sparsify(kind(config), sparsity=0.8, **options).eval()


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    return model(**inputs_of(name)).logits


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_same(model: Any, other: Any) -> None:
    assert type(other) is type(model)
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key
        assert tensor.dtype == theirs[key].dtype, key
    layers = dict(skd.nn.sparse_modules(other))
    for key, layer in skd.nn.sparse_modules(model):
        assert type(layers[key]) is type(layer)
        assert layers[key].topology == layer.topology
        assert str(layers[key].layout) == str(layer.layout)
    assert skd.coverage(other).line == skd.coverage(model).line


def test_a_round_trip_gives_the_same_model(transformers: Any, name: str, tmp_path: Path) -> None:
    kind, model = build(transformers, name)
    huggingface.save_pretrained(model, tmp_path, inputs=inputs_of(name), method="RigL")
    assert not [f for f in tmp_path.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]
    other = huggingface.from_pretrained(kind, tmp_path)
    assert_same(model, other)
    assert not other.training
    assert torch.equal(logits(model, name), logits(other, name))
    card = (tmp_path / "README.md").read_text()
    count = skd.flops.count(model, **inputs_of(name))
    assert "| method | RigL |\n| sparsity of the converted weights | 0.8 |" in card
    assert f"| {count.forward}, {count.forward / count.forward_dense:.1%}" in card


def test_shards_auto_classes_and_training_go_on(transformers: Any, tmp_path: Path) -> None:
    _, model = build(transformers, "GPT2", layout=skd.Layout("bcsr", block=4))
    assert "bcsr" in str(model.transformer.h[0].mlp.c_fc.layout)
    huggingface.save_pretrained(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    other = huggingface.from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    assert_same(model, other)
    assert other.lm_head.weight is other.transformer.wte.weight  # still tied
    for each in (model, other):
        each.train()
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        method = skd.dst.RigL(each, optimizer, drop_fraction=0.3, every=2, until=10)
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            each(input_ids=IDS, labels=IDS).loss.backward()
            method.step() or optimizer.step()
    assert_same(model, other)


def test_a_full_layer_stays_a_sparse_one_and_a_headless_model_loads(
    transformers: Any, tmp_path: Path
) -> None:
    kind, model = build(transformers, "Bert")
    skd.densify(model)
    trunk = model.bert.encoder
    weight = trunk.layer[0].output.dense.weight
    names = [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]
    skd.sparsify(model, masks={names[0]: weight != 7, names[1]: weight > 0})
    assert trunk.layer[0].output.dense.topology.density == 1
    huggingface.save_pretrained(model, tmp_path)
    other = huggingface.from_pretrained(transformers.BertModel, tmp_path)
    assert_same(trunk, other.encoder)
    huggingface.save_pretrained(other, tmp_path / "trunk")
    again = huggingface.from_pretrained(kind, tmp_path / "trunk")
    assert_same(trunk, again.bert.encoder)


def test_another_dtype(transformers: Any, tmp_path: Path) -> None:
    kind, model = build(transformers, "Llama")
    huggingface.save_pretrained(model, tmp_path)
    half = huggingface.from_pretrained(kind, tmp_path, dtype=torch.bfloat16)
    layers = dict(skd.nn.sparse_modules(half))
    for key, layer in skd.nn.sparse_modules(model):
        assert layers[key].topology == layer.topology
        assert torch.equal(layers[key].values, layer.values.bfloat16())


def damage(folder: Path, key: str, tensor: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    if tensor is None:
        del state[key]
    else:
        state[key] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "key, tensor, message",
    [
        ("values", None, "values is missing"),
        ("values", torch.full((3,), 1.0), "none of them NaN"),
        ("col_indices", torch.tensor([10**6], dtype=torch.int32), "col_indices|crow_indices"),
    ],
)
def test_damaged_tensors_are_named(transformers, tmp_path, key, tensor, message) -> None:
    kind, model = build(transformers, "Bert")
    huggingface.save_pretrained(model, tmp_path)
    layer = "bert.encoder.layer.0.output.dense"
    damage(tmp_path, f"{layer}.{key}", tensor)
    with pytest.raises(CheckpointError, match=f"{layer}.*({message})"):
        huggingface.from_pretrained(kind, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content | {"format": 2},
        lambda content: {"format": 1},
        lambda content: {"format": 1, "layers": {"a": {"class": "init", "shape": [2, 2]}}},
        lambda content: [],
    ],
)
def test_a_structure_that_is_none_is_refused(transformers: Any, tmp_path: Path, change) -> None:
    kind, model = build(transformers, "Bert")
    huggingface.save_pretrained(model, tmp_path)
    path = tmp_path / huggingface.STRUCTURE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=huggingface.STRUCTURE):
        huggingface.from_pretrained(kind, tmp_path)
    with pytest.raises(ValueError, match="sparsify"):
        huggingface.save_pretrained(skd.densify(model), tmp_path)


def test_a_sparse_weight_without_a_layer_is_named(transformers: Any, tmp_path: Path) -> None:
    kind, model = build(transformers, "Bert")
    huggingface.save_pretrained(model, tmp_path)
    path = tmp_path / huggingface.STRUCTURE
    content = json.loads(path.read_text())
    row = content["layers"]["bert.encoder.layer.0.output.dense"] | {"shape": [40, 32]}
    embedding = "bert.embeddings.word_embeddings"
    content["layers"][embedding] = row
    path.write_text(json.dumps(content))
    state = skd.nn.SparseLinear(32, 40, bias=False, sparsity=0.5).state_dict()
    damage(tmp_path, f"{embedding}.weight", None)
    for key, tensor in state.items():
        damage(tmp_path, f"{embedding}.{key}", tensor.detach())
    with pytest.raises(CheckpointError, match=rf"{embedding}.weight: sparse in the checkpoint"):
        huggingface.from_pretrained(kind, tmp_path)
