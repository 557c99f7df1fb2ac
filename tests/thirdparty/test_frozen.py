"""Networks of other packages freeze into one part, and give what they give in eval mode."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd

pytestmark = [
    pytest.mark.filterwarnings("ignore:sparsify leaves"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("torchvision", "mobilenet_v3_small"),
        ("torchvision", "efficientnet_b0"),
        ("timm", "mobilenetv3_small_100"),
        ("timm", "efficientnet_b0"),
    ],
)
def test_squeeze_and_excitation(package: str, name: str, request: pytest.FixtureRequest) -> None:
    module: Any = request.getfixturevalue(package)
    torch.manual_seed(0)
    make = partial(module.create_model, name) if package == "timm" else getattr(module.models, name)
    model = skd.sparsify(make(), sparsity=0.5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    x = torch.randn(2, 3, 64, 64)
    frozen = skd.freeze(model, x)
    exact = model.double()
    with torch.inference_mode():
        right = exact(x.double())
        assert (frozen(x) - right).abs().max() <= 1e-5 * right.abs().max()
    assert not frozen.outside
    assert len(frozen.islands) == 1


def test_bert_with_a_mask(transformers: Any) -> None:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
    )

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(config, add_pooling_layer=False)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    model = skd.sparsify(Encoder(), sparsity=0.5).eval()
    ids, mask = torch.randint(0, 50, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[0, 15:] = 0
    frozen = skd.freeze(model, ids, mask)
    with torch.inference_mode():
        right = model(ids, mask)
        assert (frozen(ids, mask) - right).abs().max() <= 1e-5 * right.abs().max()
        other = frozen(ids, torch.ones_like(mask))
        assert (other - right).abs().max() > 1e-3 * right.abs().max()  # the mask counts
    assert len(frozen.islands) == 1


def _torchvision_vit(request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue("torchvision").models.VisionTransformer(32, 8, 2, 4, 64, 128)


def _timm_vit(name: str, request: pytest.FixtureRequest) -> nn.Module:
    size = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 32}
    return request.getfixturevalue("timm").create_model(name, **size)


def _transformers_vit(name: str, request: pytest.FixtureRequest) -> nn.Module:
    transformers = request.getfixturevalue("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 128, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{name}Config")(**sizes)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = getattr(transformers, f"{name}ForImageClassification")(config)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(pixel_values=x).logits

    return Logits()


VITS = {
    "torchvision": _torchvision_vit,
    "timm ViT": partial(_timm_vit, "vit_tiny_patch16_224"),
    "timm DeiT III": partial(_timm_vit, "deit3_small_patch16_224"),  # scales of layers
    "transformers ViT": partial(_transformers_vit, "ViT"),
    "transformers DeiT": partial(_transformers_vit, "DeiT"),  # two class tokens
}


@pytest.mark.parametrize("name", VITS)
def test_vits(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VITS[name](request).eval()
    for module in model.modules():  # torchvision's head starts at zero
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)
    skd.sparsify(model, sparsity=0.5)
    x = torch.randn(2, 3, 32, 32)
    frozen = skd.freeze(model, x)
    skd.save_frozen(frozen, tmp_path / "vit.frozen")
    with torch.inference_mode():
        right = model.double()(x.double())
        assert right.any()
        assert (frozen(x) - right).abs().max() <= 1e-5 * right.abs().max()
        assert torch.equal(skd.load_frozen(tmp_path / "vit.frozen")(x), frozen(x))
