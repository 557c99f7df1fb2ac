"""The layers, networks and sparsities of the published figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from sparsekd import models
from sparsekd.bench.cases import NETWORKS, LayerCase, ModelCase, dense_ends
from sparsekd.bench.suite import BenchConfig

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
MODELS = {name: ModelCase(name) for name in NETWORKS}
STEP_CASES = (
    ModelCase("resnet18"),
    ModelCase("wrn22_2"),
    ModelCase("resnet50", batch=64),
    ModelCase("resnet20", (1, 28, 28)),
    ModelCase("resnet20", (1, 8, 8), batch=64),
    ModelCase("vgg16_bn"),
)
"""Large and small networks on large and small maps, whose steps are held against dense ones."""
LINEAR_LAYERS = (
    LayerCase("linear", 2048, 1000, batch=128),
    LayerCase("linear", 1024, 1024, batch=512),
    LayerCase("linear", 768, 3072, batch=2048),
)


def step_cases(config: BenchConfig) -> Iterator[ModelCase]:
    """Iterate over the networks of `STEP_CASES` that a config names, by default all of them.

    A network or image size that is not among them is taken as the config gives it.

    Example:
        >>> [case.title for case in step_cases(BenchConfig(networks=("resnet20",)))]
        ['resnet20 28x28', 'resnet20 8x8 b64']
    """
    for name in config.networks or dict.fromkeys(case.name for case in STEP_CASES):
        known = [case for case in STEP_CASES if case.name == name]
        if config.input_shape is not None:
            known = [case for case in known if case.input_shape == config.input_shape]
        for case in known or [ModelCase(name, config.input_shape or (3, 32, 32))]:
            yield replace(case, batch=config.batch or case.batch)


@cache
def conv_layers(networks: Sequence[str] = ("resnet18", "resnet50")) -> tuple[LayerCase, ...]:
    """List every distinct convolution of some networks but their first, in the order of the maps.

    Args:
        networks: names of networks with the CIFAR stem, on images of 32x32.

    Returns:
        The layers at batch 128, large maps first.

    Example:
        >>> len(conv_layers(("resnet18",)))
        10
    """
    found: dict[LayerCase, None] = {}
    for network in networks:
        with torch.device("meta"):
            model = models.build(network, num_classes=10)
            convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
            shapes = map_shapes(model, convs, torch.empty(2, 3, 32, 32))
        for name, conv in convs.items():
            if name != dense_ends(model)[0]:
                found[_case_of(conv, shapes[name][0][-1])] = None
    return tuple(sorted(found, key=lambda case: (-case.size, case.kernel, case.channels)))


@torch.no_grad()
def map_shapes(
    model: nn.Module, layers: Mapping[str, nn.Module], x: Tensor
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Return the shapes of input and output of some layers, by one forward pass of the model.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> [tuple(shape) for shape in map_shapes(layer, {"": layer}, torch.ones(2, 8))[""]]
        [(2, 8), (2, 4)]
    """
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def record(name: str, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        shapes[name] = (args[0].shape, y.shape)

    handles = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    model(x)
    for handle in handles:
        handle.remove()
    return shapes


def _case_of(conv: nn.Conv2d, size: int) -> LayerCase:
    return LayerCase(
        "conv", conv.in_channels, conv.out_channels, size, conv.kernel_size[0], conv.stride[0]
    )
