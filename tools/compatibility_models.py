"""The models of the compatibility table: small, with random weights, and an input for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_IDS = torch.tensor([[5, 3, 11, 2, 7, 1], [4, 4, 9, 12, 8, 6]])


def _images(side: int = 32) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, side, side, generator=_seed()).double()


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _text(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": _IDS, **more}


def _pixels() -> dict[str, Any]:
    return {"pixel_values": _images()()}


def _sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800, generator=_seed()).double()}


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return getattr(models, name)(num_classes=10, **options)

    return make


def _vit_b_16() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=10)


def _swin_t() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=10)


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, 32, 2), CNBlockConfig(32, None, 2)]
    return ConvNeXt(stages, num_classes=10)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return make


def _mixer() -> nn.Module:
    from timm.models import MlpMixer

    return MlpMixer(num_classes=10, img_size=32, patch_size=8, embed_dim=48, num_blocks=2)


def _transformers(name: str, kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**sizes)
        config._experts_implementation = "eager"
        return getattr(transformers, f"{name}{kind}")(config)

    return make


_BERT = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 16,
}  # fmt: skip
_LLAMA = {**_BERT, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
_MOE = {**_LLAMA, "intermediate_size": 24, "num_experts_per_tok": 2}
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_SPEECH = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
    "num_feat_extract_layers": 2,
}  # fmt: skip
_SMALL = {"embed_dim": 48, "depth": 2}

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "torchvision-resnet18": (_torchvision("resnet18"), _images()),
    "torchvision-densenet": (_densenet, _images()),
    "torchvision-mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), _images()),
    "torchvision-efficientnet_b0": (_torchvision("efficientnet_b0"), _images()),
    "torchvision-convnext": (_convnext, _images()),
    "torchvision-vit_b_16": (_vit_b_16, _images()),
    "torchvision-swin_t": (_swin_t, _images()),
    "timm-resnet18": (_timm("resnet18"), _images()),
    "timm-vit_tiny": (_timm("vit_tiny_patch16_224", img_size=32, **_SMALL), _images()),
    "timm-eva02_tiny": (_timm("eva02_tiny_patch14_224", img_size=28, **_SMALL), _images(28)),
    "timm-mixer_s32": (_mixer, _images()),
    "timm-regnety_002": (_timm("regnety_002"), _images()),
    "timm-mobilevit_xxs": (_timm("mobilevit_xxs"), _images(64)),
    "transformers-BERT": (
        _transformers("Bert", "ForSequenceClassification", **_BERT, num_labels=3),
        _text(attention_mask=torch.ones_like(_IDS)),
    ),
    "transformers-GPT-2": (
        _transformers(
            "GPT2",
            "LMHeadModel",
            **{"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2},
            **{"bos_token_id": 1, "eos_token_id": 2},
        ),
        _text(use_cache=False),
    ),
    "transformers-Llama": (_transformers("Llama", "ForCausalLM", **_LLAMA), _text(use_cache=False)),
    "transformers-T5": (
        _transformers(
            "T5",
            "ForConditionalGeneration",
            **{"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2},
            **{"num_heads": 2, "decoder_start_token_id": 0},
        ),
        _text(use_cache=False, decoder_input_ids=_IDS),
    ),
    "transformers-ViT": (
        _transformers("ViT", "ForImageClassification", **_VIT, num_labels=10),
        _pixels,
    ),
    "transformers-wav2vec 2.0": (_transformers("Wav2Vec2", "ForCTC", **_SPEECH), _sound),
    "transformers-Mixtral": (
        _transformers("Mixtral", "ForCausalLM", **_MOE, num_local_experts=4),
        _text(use_cache=False),
    ),
    "transformers-GPT-OSS": (
        _transformers("GptOss", "ForCausalLM", **_MOE, num_local_experts=4, head_dim=8),
        _text(use_cache=False),
    ),
}
"""How to make a model of a package, and its input: a tensor, or keyword arguments."""

NOT_TRIED = dict.fromkeys(
    (("transformers-Mixtral", "compile"), ("transformers-GPT-OSS", "compile")),
    "not tried",
)
"""What the table says in place of a result."""
