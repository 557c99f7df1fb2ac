"""skd.optimize on models of torchvision and timm: every norm is fused, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sparsekd as skd


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=4)


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=4, width_per_group=8)


def _vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    features = make_layers([8, "M", 512, "M"], batch_norm=True)
    model = VGG(features, num_classes=4, init_weights=False)
    return nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1))


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2), 8, num_classes=4)


def _checkpointed_densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2), 8, num_classes=4, memory_efficient=True)


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(num_classes=4, width_mult=0.25, dropout=0.0)


def _mobilenet_v3() -> nn.Module:
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=4, width_mult=0.25, dropout=0.0)


def _regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    size = {"depth": 4, "w_0": 8, "w_a": 8.0, "w_m": 2.0, "group_width": 8, "se_ratio": 0.25}
    return RegNet(BlockParams.from_init_params(**size), num_classes=4)


def _inception_blocks() -> nn.Module:
    from torchvision.models.googlenet import BasicConv2d as GoogLeNetConv2d
    from torchvision.models.inception import BasicConv2d as InceptionConv2d

    return nn.Sequential(GoogLeNetConv2d(3, 8, kernel_size=3), InceptionConv2d(8, 8, kernel_size=3))


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=4)

    make.__name__ = name
    return make


BLUR: dict[str, Any] = {"aa_layer": "blurpool"}
SE: dict[str, Any] = {"block_args": {"attn_layer": "se"}}


def _small_timm(block: str = "BasicBlock", **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm.layers import BlurPool2d
        from timm.models import resnet

        if "aa_layer" in options:
            options["aa_layer"] = BlurPool2d
        sizes = {"channels": (8, 16, 32, 64), "num_classes": 4}
        return resnet.ResNet(getattr(resnet, block), (1, 1, 1, 1), **sizes, **options)

    make.__name__ = f"timm {block} {' '.join(options)}"
    return make


MAKERS = [
    *(_resnet18, _resnet50, _vgg, _densenet, _checkpointed_densenet, _mobilenet_v2, _mobilenet_v3),
    *(_regnet, _inception_blocks, _timm("mobilenetv3_small_050"), _timm("regnety_002")),
    *(_small_timm(), _small_timm("Bottleneck", **BLUR), _small_timm("Bottleneck", **SE)),
]
RELUS = {"_resnet18": 17, "_resnet50": 49, "_vgg": 2, "_densenet": 10, "_inception_blocks": 2}


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__.strip("_"))
def make(request, torchvision, timm) -> Callable[[], nn.Module]:
    return request.param


def test_every_norm_is_fused(make, twins, count) -> None:
    fast, plain = twins(make)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused, left, _ = count(copy.deepcopy(fast), x)
    assert (fused, left) == (norms, 0)
    assert len(skd.nn.fused_norms(fast).fused) == norms
    relus = count(copy.deepcopy(plain), x)[2] - count(copy.deepcopy(fast), x)[2]
    assert relus == RELUS.get(make.__name__, relus)


def test_steps_are_equal(make, twins) -> None:
    fast, plain = twins(make)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        sides = []
        for model in (fast.train(training), plain.train(training)):
            model.zero_grad()
            y = model(x)
            y.sin().sum().backward()
            sides.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
        torch.testing.assert_close(sides[0], sides[1], rtol=1e-6, atol=1e-8)


def test_it_is_taken_back_and_copied(make, count) -> None:
    model = make()
    classes, names = [type(m) for m in model.modules()], list(model.state_dict())
    fast = skd.optimize(model)
    assert list(fast.state_dict()) == names
    assert all(isinstance(m, cls) for m, cls in zip(fast.modules(), classes, strict=True))
    x = torch.randn(2, 3, 32, 32)
    expected = count(copy.deepcopy(fast), x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert count(other, x) == expected
    assert [type(m) for m in skd.nn.unfuse(fast).modules()] == classes


def test_a_hook_in_a_norm_with_activation_sees_its_input(timm) -> None:
    from timm.layers import BatchNormAct2d

    model = skd.optimize(nn.Sequential(nn.Conv2d(2, 2, 1), BatchNormAct2d(2)))
    seen: list[torch.Tensor] = []
    model[1].act.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    y = model(torch.randn(4, 2, 3, 3))
    assert float(seen[0].detach().min()) < 0
    torch.testing.assert_close(seen[0].relu(), y)


def _dilated_resnet50() -> nn.Module:
    from torchvision.models import resnet50

    dilated = [False, False, True]
    return resnet50(num_classes=4, width_per_group=8, replace_stride_with_dilation=dilated)


def _resnext() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4, groups=4, width_per_group=8)


@pytest.mark.parametrize(
    "make, count",
    [
        (_resnet18, 9), (_resnet50, 17), (_dilated_resnet50, 17), (_resnext, 5),
        (_small_timm(), 5), (_small_timm("Bottleneck"), 5),
        (_small_timm(stem_width=32, stem_type="deep", avg_down=True), 6),
    ],
    ids=["resnet18", "resnet50", "dilated", "resnext", "timm", "timm, bottleneck", "timm, deep"],
)  # fmt: skip
def test_residual_blocks_run_in_the_blocked_layout(
    make, count, torchvision, timm, sparse_twins, blocks, one_step, assert_near
) -> None:
    fast, plain = sparse_twins(make)
    x = torch.randn(12, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        blocks.clear()
        found = one_step(fast.train(training), x)
        assert len(blocks) == count
        assert_near(found, one_step(plain.train(training), x), 1e-8)


@pytest.mark.parametrize(
    "what", ["hook", "other activation", "other shortcut", "other norm", "hook on a stage"]
)
def test_residual_blocks_that_others_see_run_as_before(
    what, torchvision, sparse_twins, blocks, one_step, assert_near
) -> None:
    twins, seen = sparse_twins(_resnet18), []
    for model in twins:
        block = model.layer2[0]
        if what == "hook":
            block.relu.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
        elif what == "other activation":
            block.relu = nn.SiLU()
        elif what == "other shortcut":
            block.downsample.append(nn.Tanh())
        elif what == "other norm":
            block.bn1 = nn.GroupNorm(8, 128, dtype=torch.float64)
        else:
            model.layer2.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    x = torch.randn(12, 3, 32, 32, dtype=torch.float64)
    found = [one_step(model, x) for model in twins]
    assert_near(*found, 1e-8)
    assert len(seen) == {"hook": 4, "hook on a stage": 2}.get(what, 0)
    # The block itself may not; its shortcut by itself may.
    assert len(blocks) in ((9,) if what == "hook on a stage" else (8, 9))
    assert_near(seen[: len(seen) // 2], seen[len(seen) // 2 :], 1e-8)


@torch.no_grad()
def test_a_norm_with_a_relu_of_its_own(torchvision, sparse_twins, assert_near) -> None:
    twins = sparse_twins(_resnet18)
    for model in twins:
        model.layer2[1].bn2 = skd.models.norm_act.BatchNormAct2d(128, dtype=torch.float64)
    skd.optimize(twins[0])
    x = torch.randn(12, 3, 32, 32, dtype=torch.float64)
    assert_near(*([model(x)] for model in twins))


@pytest.mark.parametrize(
    "make, count",
    [
        (_small_timm(**BLUR), 2), (_small_timm("Bottleneck", **SE), 1),
        (_small_timm(drop_path_rate=0.5), 2), (_small_timm(drop_block_rate=0.1), 3),
    ],
    ids=["blur", "weighed channels", "dropped paths", "dropped blocks"],
)  # fmt: skip
def test_blocks_of_timm_that_do_more_run_as_before(
    make, count, timm, sparse_twins, blocks, one_step, assert_near
) -> None:
    fast, plain = sparse_twins(make)
    x = torch.randn(12, 3, 32, 32, dtype=torch.float64)
    steps = []
    for model in (fast, plain):
        torch.manual_seed(0)  # of the blocks that are dropped
        steps.append(one_step(model, x))
    assert len(blocks) >= count
    assert_near(*steps, 1e-8)


def test_checkpoints_of_timm(timm, sparse_twins, blocks, one_step, assert_near) -> None:
    fast, plain = sparse_twins(_small_timm())
    for model in (fast, plain):
        model.set_grad_checkpointing()
    x = torch.randn(12, 3, 32, 32, dtype=torch.float64)
    assert_near(one_step(fast, x), one_step(plain, x), 1e-8)
