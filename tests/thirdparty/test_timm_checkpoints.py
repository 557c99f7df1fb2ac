"""timm's checkpoint helpers save and load models with sparse layers as they do dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekd as skd

pytestmark = [
    pytest.mark.filterwarnings("ignore:sparsify leaves"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of channels without a weight
]


def build(timm: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    size = {"img_size": 32, "embed_dim": 48, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)


def assert_same(model: Any, other: Any) -> None:
    state = model.state_dict()
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in other.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("other_topology", [True, False], ids=["sparse", "dense"])
def test_saver_and_loader(timm: Any, tmp_path: Path, other_topology: bool) -> None:
    from timm.models import load_checkpoint, load_state_dict
    from timm.utils import CheckpointSaver

    model = skd.sparsify(build(timm, 0), sparsity=0.8, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(1, 0.5)
    path = str(tmp_path / "last.pth.tar")
    other = build(timm, 1)
    if other_topology:
        skd.sparsify(other, sparsity=0.5, seed=1)
    else:
        skd.sparsify(other, masks=skd.nn.stored_masks(load_state_dict(path), other))
    load_checkpoint(other, path)
    assert_same(model, other)


def test_resume(timm: Any, tmp_path: Path) -> None:
    from timm.models import resume_checkpoint
    from timm.utils import CheckpointSaver

    def training(seed: int) -> tuple[Any, Any]:
        model = skd.sparsify(build(timm, seed), sparsity=0.8, seed=seed)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        model.train()(x).square().mean().backward()
        optimizer.step()

    model, optimizer = training(0)
    step(model, optimizer)
    CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(1, 0.5)
    other, its = training(1)
    assert resume_checkpoint(other, str(tmp_path / "last.pth.tar"), its) == 2
    step(model, optimizer)
    step(other, its)
    assert_same(model, other)
