"""Every network: sizes, names, shapes, errors, and what compilation and sparsification rely on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsekd import models
from sparsekd.errors import UnsupportedError

# Published parameter counts: torchvision's documentation for the imagenet stem, the wide
# residual networks paper, and what the layer tables of the papers add up to for the others.
PARAMETERS = {
    ("resnet20", ""): 272_474,
    ("resnet32", ""): 466_906,
    ("resnet44", ""): 661_338,
    ("resnet56", ""): 855_770,
    ("resnet110", ""): 1_730_714,
    ("resnet18", "cifar"): 11_173_962,
    ("resnet34", "cifar"): 21_282_122,
    ("resnet50", "cifar"): 23_520_842,
    ("resnet18", "imagenet"): 11_689_512,
    ("resnet34", "imagenet"): 21_797_672,
    ("resnet50", "imagenet"): 25_557_032,
    ("resnet101", "imagenet"): 44_549_160,
    ("resnet152", "imagenet"): 60_192_808,
    ("vgg16_bn", "imagenet"): 138_365_992,
    ("vgg19_bn", "imagenet"): 143_678_248,
    ("wrn22_2", ""): 1_079_642,
    ("wrn28_10", ""): 36_479_194,
    ("lenet300_100", ""): 266_610,
    ("lenet5", ""): 61_706,
    ("vit_tiny", ""): 5_381_194,
    ("char_gpt", ""): 2_712_576,
}


def on_meta(name: str, **kwargs) -> nn.Module:
    """Build without allocating or initialising anything."""
    with torch.device("meta"):
        return models.build(name, **kwargs)


@pytest.mark.parametrize(("name", "stem"), PARAMETERS)
def test_number_of_parameters(name, stem):
    model = on_meta(name, **({"stem": stem} if stem else {}))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, stem]


def test_every_network_is_counted():
    assert {name for name, _ in PARAMETERS} == set(models.names())


@pytest.mark.parametrize("name", models.names())
def test_logits_have_the_right_shape(name):
    channels = 2
    model = on_meta(name, num_classes=7, in_channels=channels)
    x = torch.empty(3, channels, 28, 28, device="meta")
    assert model(x).shape == (3, 7)


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet18", "resnet50", "wrn22_2", "vgg16_bn", "lenet5"]
)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    channels = 1 if name == "lenet5" else 3
    model = models.build(name, num_classes=4)
    model(torch.randn(2, channels, 28, 28)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("size", [8, 9, 28, 33])
def test_resnets_take_any_resolution(size):
    model = on_meta("resnet20", in_channels=1)
    assert model(torch.empty(2, 1, size, size, device="meta")).shape == (2, 10)


def test_vit_tiny_has_its_published_size():
    with torch.device("meta"):
        model = models.vit_tiny(1000, input_size=224)
    assert sum(p.numel() for p in model.parameters()) == 5_717_416  # table 1 of DeiT, timm's count
    assert model.patch_embed.kernel_size == (16, 16)
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_vit_tiny_equals_torch_encoder_layers():
    """A block is what nn.TransformerEncoderLayer computes in its pre-norm form."""
    torch.manual_seed(0)
    model = models.vit_tiny(width=0.25).double()
    block = model.blocks[0]
    layer = nn.TransformerEncoderLayer(
        48, 3, 192, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    names = {
        "self_attn.in_proj_": block.attn.qkv, "self_attn.out_proj.": block.attn.proj,
        "linear1.": block.fc1, "linear2.": block.fc2, "norm1.": block.norm1, "norm2.": block.norm2,
    }  # fmt: skip
    state = {
        f"{n}{leaf}": getattr(m, leaf) for n, m in names.items() for leaf in ("weight", "bias")
    }
    layer.load_state_dict(state)
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(block(x), layer(x), rtol=1e-10, atol=1e-10)


def test_char_gpt_reads_only_what_is_before_and_at_most_its_context():
    torch.manual_seed(0)
    model = models.char_gpt(num_classes=20, context=6, width=0.25).double()
    seen: list[torch.Tensor] = []
    model.blocks.register_forward_hook(lambda *args: seen.append(args[2]))
    tokens = torch.randint(20, (3, 6))
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 20
    model(tokens)
    model(other)
    assert torch.equal(seen[0][:, :4], seen[1][:, :4])
    assert not torch.equal(seen[0][:, 4:], seen[1][:, 4:])
    longer = torch.cat([other[:, :2], tokens], 1)
    assert torch.equal(model(longer), model(tokens))
    assert torch.equal(model(tokens[:, None, None].float()), model(tokens))


def test_lenets_take_other_resolutions():
    for name in ("lenet300_100", "lenet5"):
        model = models.build(name, in_channels=3, input_size=32)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("stem", "classes"), [("cifar", 10), ("imagenet", 1000)])
def test_classes_default_to_those_of_the_stem(stem, classes):
    assert on_meta("resnet18", stem=stem).fc.out_features == classes
    assert on_meta("resnet18", stem=stem, num_classes=7).fc.out_features == 7


@pytest.mark.parametrize("name", ["resnet18", "resnet152", "vgg16_bn", "vgg19_bn"])
def test_unknown_stem_is_refused_by_name(name):
    with pytest.raises(UnsupportedError, match=r"stem: .*'cifar', 'imagenet'.*'mnist'"):
        models.build(name, stem="mnist")


def test_unknown_network_is_refused():
    with pytest.raises(UnsupportedError, match=r"name: .*resnet20.*'resnet21'"):
        models.build("resnet21")


@pytest.mark.parametrize(("depth", "blocks"), [(56, 6), (110, 12)])
def test_bottleneck_variant_keeps_the_depth(depth, blocks):
    model = on_meta(f"resnet{depth}", bottleneck=True)
    convolutions = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and "downsample" not in name
    ]
    assert len(convolutions) + 1 == depth
    assert len(model.layer1) == blocks
    assert model.fc.in_features == 256


def test_depth_is_six_n_plus_two():
    for depth in (20, 32, 44, 56, 110):
        model = on_meta(f"resnet{depth}")
        convolutions = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and "downsample" not in name
        ]
        assert len(convolutions) + 1 == depth


def test_stride_sits_on_the_3x3_convolution():
    model = on_meta("resnet50")
    block = model.layer2[0]
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)
    assert block.downsample[0].stride == (2, 2)


def test_wide_resnet_maskable_weights():
    model = on_meta("wrn22_2")
    assert sum(p.numel() for p in model.parameters() if p.ndim >= 2) == 1_076_912


def test_initialisation_follows_he():
    torch.manual_seed(0)
    model = models.resnet18(num_classes=10)
    weight = model.layer4[1].conv2.weight
    fan_out = weight.shape[0] * 9
    # The sample deviation of n normal numbers scatters by 1 / sqrt(2n) of itself.
    assert weight.std().item() == pytest.approx(
        (2 / fan_out) ** 0.5, rel=5 / (2 * weight.numel()) ** 0.5
    )
    assert torch.equal(model.bn1.weight, torch.ones(64))


def test_zero_init_residual_makes_blocks_the_identity():
    model = models.resnet50(zero_init_residual=True)
    block = model.layer1[1].eval()
    x = torch.rand(2, 256, 4, 4)
    assert torch.equal(block(x), x)
    plain = models.resnet20()
    assert plain.layer1[0].bn2.weight.min() == 1


def test_same_seed_same_weights():
    torch.manual_seed(3)
    first = models.resnet20().state_dict()
    torch.manual_seed(3)
    second = models.resnet20().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_deepcopy_is_independent():
    model = models.wrn22_2()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv1.weight.zero_()
    assert model.conv1.weight.abs().sum() > 0


@pytest.mark.parametrize("name", ["resnet20", "wrn22_2", "vgg16_bn", "lenet5", "resnet50"])
def test_traces_without_a_graph_break(name):
    model = models.build(name).eval()
    x = torch.randn(2, 1 if name == "lenet5" else 3, 28, 28)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_import_needs_no_sparse_module():
    sources = {type(module).__module__ for module in models.resnet18().modules()}
    assert all(source.startswith(("torch.nn", "sparsekd.models")) for source in sources)


@pytest.mark.parametrize("name", models.names())
def test_width_scales_every_channel_but_the_outputs(name):
    options = {"num_classes": 7}
    with torch.device("meta"):
        full, half = models.build(name, **options), models.build(name, width=0.5, **options)
    pairs = list(zip(layers(full), layers(half), strict=True))
    for index, ((_, a), (_, b)) in enumerate(pairs):
        (rows, cols), found = a.weight.shape[:2], b.weight.shape[:2]
        assert found[0] == (rows if index == len(pairs) - 1 else round(rows / 2))
        pixels = index == 0 and name != "char_gpt"  # whose first layer reads an embedding
        assert found[1] == (cols if pixels else round(cols / 2))


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("sparsity", "published"), [(0.8, 0.465), (0.9, 0.34), (0.95, 0.26), (0.965, 0.231)]
)
def test_small_dense_resnet50_is_as_wide_as_published(sparsity, published):
    """Widths of the released code of RigL, which are rounded by hand."""
    with torch.device("meta"):
        model = models.small_dense("resnet50", sparsity, stem="imagenet")
    assert model.layer4[0].conv1.out_channels / 512 == pytest.approx(published, abs=0.0065)


@pytest.mark.parametrize("name", ["resnet20", "wrn22_2", "vgg16_bn", "lenet5", "lenet300_100"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
def test_small_dense_takes_the_bits_of_the_sparse_network(name, sparsity):
    with torch.device("meta"):
        full, small = models.build(name), models.small_dense(name, sparsity)
    weights = sum(m.weight.numel() for _, m in layers(full))
    total, narrow = (sum(p.numel() for p in m.parameters()) for m in (full, small))
    room = (1 - sparsity) * weights + weights / 32 + total - weights
    assert 0.75 * room < narrow <= room


def test_small_dense_at_the_ends():
    assert models.small_dense("lenet5", 0.0).conv1.out_channels == 6
    with pytest.raises(ValueError, match="sparsity: expected a number in"):
        models.small_dense("lenet5", 1.0)
    with pytest.raises(ValueError, match="width: expected a positive factor, got 0"):
        models.resnet20(width=0)
