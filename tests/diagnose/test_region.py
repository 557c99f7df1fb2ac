"""What `region` says runs in the layout of the kernels, and what it says of the rest."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.diagnose import region
from sparsekd.models.resnet import BasicBlock


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BasicBlock(8, 8),
        nn.MaxPool2d(2),
        BasicBlock(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return skd.sparsify(model, sparsity=0.7, distribution="uniform", skip=("0", "8"))


BLOCKS = (
    ("3.conv1", "3.bn1", "3.conv2", "3.bn2"),
    ("5.conv1", "5.bn1", "5.conv2", "5.bn2", "5.downsample.0", "5.downsample.1"),
)


def test_blocks_and_the_rest() -> None:
    model = skd.optimize(network())
    model[5].requires_grad_(False)
    before = copy.deepcopy(model)
    found = region(model, (16, 3, 8, 8))
    assert found.blocks == BLOCKS
    assert found.outside == {
        "0": "it is dense, and no sparse convolution follows at once",
        "1": "the other modules of its block do not take part",
        "8": "Linear has no place in it",
    }
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
        assert one.grad is None
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before.get_buffer(name))
    assert model.training
    text = str(found)
    assert "2 blocks of 10 modules, 3 modules outside" in text
    assert "3.conv1, 3.bn1, 3.conv2, 3.bn2" in text


def test_networks_of_the_package() -> None:
    for build, blocks in ((skd.models.resnet20, 10), (skd.models.wrn22_2, 10)):
        model = skd.sparsify(build(), sparsity=0.9, distribution="uniform", skip=("conv1", "fc"))
        skd.optimize(model)
        found = region(model, (16, 3, 16, 16))
        assert len(found.blocks) == blocks
        assert set(found.outside) <= {"fc", "bn"}  # the last norm of a WRN reads its last block


def test_reasons() -> None:
    def why(model: nn.Module, name: str, shape: tuple[int, ...] = (16, 3, 8, 8)) -> str:
        return region(model, shape).outside[name]

    assert why(network(), "3.conv1") == "optimize was not called"
    assert "fill its lanes" in why(skd.optimize(network()), "3.conv1", (2, 3, 8, 8))
    hooked = skd.optimize(network())
    hooked[3].conv1.register_forward_hook(lambda *_: None)
    assert "hooks" in why(hooked, "3.conv1")
    assert "do not take part" in why(hooked, "3.bn2")
    assert region(hooked, (16, 3, 8, 8)).blocks == BLOCKS[1:]
    full = network()
    full[3].conv2.rewire(torch.ones(8, 8, 3, 3, dtype=torch.bool))
    full[3].conv1.rewire(torch.ones(8, 8, 3, 3, dtype=torch.bool))
    with skd.backend("cpp"):  # where a rule decides, not the clock
        assert "weights are stored" in why(skd.optimize(full), "3.conv2")
    own = skd.sparsify(nn.Sequential(Own()), sparsity=0.7)
    assert why(skd.optimize(own), "0.conv", (16, 8, 8, 8)) == "optimize has no row for Own"
    wide = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    wide = skd.sparsify(wide, sparsity=0.7, skip="0")
    assert why(skd.optimize(wide), "0", (16, 8, 8, 8)) == "its weight is dense"


def test_a_model_without_maps() -> None:
    model = skd.optimize(skd.sparsify(nn.Sequential(nn.Linear(8, 8)), sparsity=0.5))
    found = region(model, (16, 8))
    assert not found.blocks
    assert found.outside == {"0": "SparseLinear has no place in it"}
