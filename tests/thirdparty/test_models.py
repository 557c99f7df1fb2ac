"""Popular models, small and with random weights: what a user does with them gives dense numbers.

Every model is compared with its twin, the same weights stored dense, in float64.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.diagnose.inputs import tensors_in
from sparsekd.nn import sparse_modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:sparsify leaves"),
    pytest.mark.filterwarnings("ignore:.*computes with its dense weight"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of channels without a weight
]

IDS = torch.tensor([[5, 3, 11, 2, 7, 1], [4, 4, 9, 12, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def images(side: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).double()


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=10, width_per_group=8)


def _mobilenet_v3() -> nn.Module:
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=10, width_mult=0.5)


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, 32, 2), CNBlockConfig(32, None, 2)]
    return ConvNeXt(stages, stochastic_depth_prob=0.1, num_classes=10)


def _vit_b_16() -> nn.Module:
    from torchvision.models import VisionTransformer

    size = {"hidden_dim": 32, "mlp_dim": 64, "num_layers": 2, "num_heads": 2}
    return VisionTransformer(image_size=32, patch_size=16, num_classes=10, **size)


def _swin_t() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return make


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    size = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 16,
    }  # fmt: skip
    text = {
        **size, "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    vision = {**size, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _text() -> dict[str, Any]:
    return {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}


_SMALL = {"embed_dim": 48, "depth": 2}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "torchvision-resnet50": (_resnet50, images),
    "torchvision-mobilenet_v3": (_mobilenet_v3, images),
    "torchvision-convnext_tiny": (_convnext, images),
    "torchvision-vit_b_16": (_vit_b_16, images),
    "torchvision-swin_t": (_swin_t, images),
    "timm-vit_tiny": (_timm("vit_tiny_patch16_224", img_size=32, **_SMALL), images),
    "timm-beit": (_timm("beit_base_patch16_224", img_size=32, num_heads=3, **_SMALL), images),
    "timm-eva02": (_timm("eva02_tiny_patch14_224", img_size=28, **_SMALL), lambda: images(28)),
    "timm-regnety": (_timm("regnety_002"), images),
    "timm-mobilevit": (_timm("mobilevit_xxs"), lambda: images(64)),
    "transformers-BERT": (_bert, lambda: {"input_ids": IDS, "attention_mask": MASK}),
    "transformers-GPT-2": (_gpt2, _text),
    "transformers-Llama": (_llama, _text),
    "transformers-T5": (_t5, lambda: {**_text(), "labels": IDS}),
    "transformers-ViT": (_vit, lambda: {"pixel_values": images()}),
    "transformers-CLIP": (
        _clip,
        lambda: {"input_ids": IDS, "attention_mask": MASK, "pixel_values": images()},
    ),
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """Return the name of a model whose package is there."""
    request.getfixturevalue(request.param.partition("-")[0])
    return request.param


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a model in float64 of which all parameters are drawn, also biases and scales."""
    torch.manual_seed(seed)
    model = MODELS[name][0]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(torch.rand_like(parameter), alpha=0.1)
    return model.train()


def sparse(name: str, seed: int = 0) -> nn.Module:
    return skd.sparsify(build(name, seed), sparsity=0.8, seed=seed)


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    """Call a model, its dropout drawn alike each time; return what depends on its weights."""
    inputs = MODELS[name][1]()
    torch.manual_seed(3)
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return [t for t in tensors_in(found) if t.is_floating_point()]


def backward(model: nn.Module, name: str) -> list[Tensor]:
    found = outputs(model, name)
    generator = torch.Generator().manual_seed(4)
    weighted = [torch.rand(t.shape, generator=generator).double() * t for t in found]
    torch.stack([t.mean() for t in weighted]).sum().backward()
    return [t.detach() for t in found]


def assert_close(found: Tensor, expected: Tensor, what: str = "") -> None:
    assert found.shape == expected.shape, what
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * scale, msg=what or None)


def assert_same_outputs(model: nn.Module, other: nn.Module, name: str) -> None:
    with torch.no_grad():
        pairs = list(zip(outputs(model, name), outputs(other, name), strict=True))
    assert pairs
    for found, expected in pairs:
        assert_close(found, expected)


def dense_gradients(model: nn.Module, twin: nn.Module) -> dict[str, Tensor | None]:
    """Return the gradients of a dense twin by the names of the sparse model's parameters.

    Those of weights are as `topology` has them, also where the twin packs or transposes them.
    """
    found = {name: p.grad for name, p in twin.named_parameters()}
    for name, split in model.named_modules():
        if isinstance(split, skd.nn.SplitAttention | skd.nn.SplitExperts):
            for part in split.parts:
                for leaf, place in part.places:
                    grad = found[f"{name}.{place.path}"]
                    found[f"{name}.{part.layer}.{leaf}"] = None if grad is None else place.of(grad)
    for layer, module in sparse_modules(model):
        grad = found[f"{layer}.weight"]
        turned = grad is not None and isinstance(module, skd.nn.SparseConv1D)
        found[f"{layer}.values"] = grad.t() if turned else grad
    return found


def test_outputs_and_gradients_are_those_of_the_dense_twin(name: str) -> None:
    model = sparse(name)
    twin = skd.densify(copy.deepcopy(model))
    for found, expected in zip(backward(model, name), backward(twin, name), strict=True):
        assert_close(found, expected)
    layers = {f"{layer}.values": module for layer, module in sparse_modules(model)}
    assert layers
    gradients = dense_gradients(model, twin)
    for key, parameter in model.named_parameters():
        expected = gradients[key]
        assert (parameter.grad is None) == (expected is None), key
        if parameter.grad is not None:
            if key in layers:
                expected = expected.reshape(-1)[layers[key].topology.flat_indices()]
            assert_close(parameter.grad, expected, key)


def test_training_updates_and_storage(name: str) -> None:
    model = sparse(name)
    before = {layer: module.topology for layer, module in sparse_modules(model)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    method = skd.dst.RigL(model, optimizer, drop_fraction=0.3, every=2, until=100)
    for _ in range(3):
        twin = skd.densify(copy.deepcopy(model))
        optimizer.zero_grad()
        backward(model, name)
        if method.step():
            break
        optimizer.step()
    else:
        raise AssertionError("RigL never updated")
    assert_grown_by_dense_gradient(model, before, twin, name)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, name)
        method.step() or optimizer.step()

    model.eval()
    assert not any(module.training for module in model.modules())
    assert_same_outputs(copy.deepcopy(model), model, name)
    dense = skd.densify(copy.deepcopy(model))
    assert not list(sparse_modules(dense))
    assert_same_outputs(dense, model, name)

    other = sparse(name, seed=1).eval()
    other.load_state_dict(model.state_dict())
    assert_same_outputs(other, model, name)
    plain = build(name, seed=2).eval()
    plain.load_state_dict(dense.state_dict())
    assert_same_outputs(plain, model, name)


def assert_grown_by_dense_gradient(
    model: nn.Module, before: dict[str, skd.Topology], twin: nn.Module, name: str
) -> None:
    """Check that as many weights grew as were dropped, where the dense gradient is largest."""
    backward(twin.train(), name)
    moved, gradients = 0, dense_gradients(model, twin)
    for layer, module in sparse_modules(model):
        old, new = before[layer].mask(), module.topology.mask()
        assert new.sum() == old.sum(), layer
        grad = gradients[f"{layer}.values"]
        grown, free = new & ~old, ~(new | old)
        moved += int(grown.sum())
        if grad is not None and grown.any() and free.any():
            assert grad[grown].abs().min() >= grad[free].abs().max() * (1 - 1e-9), layer
    assert moved > 0


def test_flops_count_what_the_twin_computes(name: str) -> None:
    model, inputs = sparse(name), MODELS[name][1]()
    twin = skd.densify(copy.deepcopy(model))
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    found, dense = (skd.flops.count(m, *args, **kwargs) for m in (model, twin))
    assert found.forward_dense == dense.forward == dense.forward_dense
    assert found.products == dense.products
    assert found.forward < dense.forward
    nnz = {layer.name: layer.nnz for layer in found.layers}
    for layer, module in sparse_modules(model):
        # one of them, where its weight is read from outside
        assert nnz.get(layer) == module.topology.nnz or f"{layer}.weight" in nnz, layer


@pytest.mark.parametrize(
    "name, parameter",
    [
        ("transformers-GPT-2", "lm_head.weight"),
        ("transformers-BERT", "bert.embeddings.word_embeddings.weight"),
        ("transformers-T5", "shared.weight"),
    ],
)
def test_what_stays_dense_is_named(name, parameter, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(name.partition("-")[0])
    with pytest.warns(UserWarning, match=re.escape(parameter.removesuffix(".weight"))):
        model = sparse(name)
    found = skd.coverage(model)
    assert parameter in {each for part in found.dense for each in part.names}
    total = sum(p.numel() for p in build(name).parameters())
    layers = [module.topology for _, module in sparse_modules(model)]
    zeros = sum(topology.numel - topology.nnz for topology in layers)
    assert found.asked == 0.8
    assert found.converted == pytest.approx(zeros / sum(topology.numel for topology in layers))
    assert found.converted == pytest.approx(0.8, abs=1e-4)
    assert found.whole == pytest.approx(zeros / total)


@pytest.mark.parametrize("name", ["timm-mobilevit", "transformers-T5"])
def test_explain_shows_every_layer(name: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    request.getfixturevalue(name.partition("-")[0])
    model, inputs = sparse(name), MODELS[name][1]()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    found = skd.explain(model, *args, **kwargs)
    assert {layer.name for layer in found.layers} == {layer for layer, _ in sparse_modules(model)}
