"""With the imagenet stem, names and shapes are those of torchvision's state dicts.

torchvision need not be installed: its layouts are written out here by rule, and spot-checked
against entries copied from its published checkpoints. Where it is, they are checked against itself.
"""

from __future__ import annotations

import pytest
import torch

from sparsekd import models

Layout = dict[str, tuple[int, ...]]


def batch_norm(name: str, channels: int) -> Layout:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{key}": (channels,) for key in vectors} | {f"{name}.num_batches_tracked": ()}


def resnet_layout(depths: tuple[int, ...], bottleneck: bool) -> Layout:
    layout: Layout = {"conv1.weight": (64, 3, 7, 7)} | batch_norm("bn1", 64)
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        out = width * (4 if bottleneck else 1)
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            shapes = (
                [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
                if bottleneck
                else [(width, channels, 3, 3), (width, width, 3, 3)]
            )
            for number, shape in enumerate(shapes, start=1):
                layout[f"{name}.conv{number}.weight"] = shape
                layout |= batch_norm(f"{name}.bn{number}", shape[0])
            if block == 0 and (stage > 0 or out != channels):
                layout[f"{name}.downsample.0.weight"] = (out, channels, 1, 1)
                layout |= batch_norm(f"{name}.downsample.1", out)
            channels = out
    return layout | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


def vgg_layout(plan: str) -> Layout:
    """Write the layout of a plan such as "64 M 128 M", M standing for a max-pool."""
    layout: Layout = {}
    channels, position = 3, 0
    for entry in plan.split():
        if entry == "M":
            position += 1
            continue
        width = int(entry)
        layout[f"features.{position}.weight"] = (width, channels, 3, 3)
        layout[f"features.{position}.bias"] = (width,)
        layout |= batch_norm(f"features.{position + 1}", width)
        channels, position = width, position + 3
    for position, (out, width) in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items():
        layout[f"classifier.{position}.weight"] = (out, width)
        layout[f"classifier.{position}.bias"] = (out,)
    return layout


LAYOUTS = {
    "resnet18": resnet_layout((2, 2, 2, 2), bottleneck=False),
    "resnet34": resnet_layout((3, 4, 6, 3), bottleneck=False),
    "resnet50": resnet_layout((3, 4, 6, 3), bottleneck=True),
    "resnet101": resnet_layout((3, 4, 23, 3), bottleneck=True),
    "resnet152": resnet_layout((3, 8, 36, 3), bottleneck=True),
    "vgg16_bn": vgg_layout("64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M"),
    "vgg19_bn": vgg_layout(
        "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M"
    ),
}

CHECKPOINT_ENTRIES = {
    "resnet18": {
        "conv1.weight": (64, 3, 7, 7),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer2.0.downsample.1.running_var": (128,),
        "layer4.1.bn2.num_batches_tracked": (),
        "fc.weight": (1000, 512),
    },
    "resnet50": {
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer3.5.conv3.weight": (1024, 256, 1, 1),
        "layer4.0.conv2.weight": (512, 512, 3, 3),
        "fc.bias": (1000,),
    },
    "vgg16_bn": {
        "features.0.weight": (64, 3, 3, 3),
        "features.40.weight": (512, 512, 3, 3),
        "features.41.running_mean": (512,),
        "classifier.0.weight": (4096, 25088),
        "classifier.6.bias": (1000,),
    },
}
NUMBER_OF_ENTRIES = {"resnet18": 122, "resnet50": 320}


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_dict_is_torchvisions(name):
    with torch.device("meta"):
        state = models.build(name, stem="imagenet").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == LAYOUTS[name]
    assert CHECKPOINT_ENTRIES.get(name, {}).items() <= LAYOUTS[name].items()
    assert len(state) == NUMBER_OF_ENTRIES.get(name, len(state))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_those_of_the_installed_torchvision(name, torchvision):
    with torch.device("meta"):
        state = torchvision.models.get_model(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == LAYOUTS[name]


def test_state_dict_loads_strictly():
    checkpoint = {key: torch.ones(shape) for key, shape in LAYOUTS["resnet18"].items()}
    model = models.resnet18(stem="imagenet")
    model.load_state_dict(checkpoint, strict=True)
    assert model.layer3[0].downsample[0].weight.unique().tolist() == [1.0]


def test_vgg_features_keep_their_names_with_the_cifar_stem():
    with torch.device("meta"):
        small = models.vgg16_bn().state_dict()
    features = {key for key in LAYOUTS["vgg16_bn"] if key.startswith("features")}
    assert features == {key for key in small if key.startswith("features")}
    assert small["classifier.weight"].shape == (10, 512)
