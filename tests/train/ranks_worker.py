"""What every rank does in tests/train/test_distributed.py; started by torchrun."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekd import data, sparsify
from sparsekd.dst import RigL
from sparsekd.train import Interrupted, StopRequest, Trainer, Training, distributed, make_optimizer
from sparsekd.train.batchnorm import synchronize


def images() -> data.Split:
    """Return 152 images: batches of 32 and a last one of 24, all of which divide by two."""
    dataset = data.load(
        "synthetic",
        num_classes=4,
        input_shape=(1, 8, 8),
        train_size=152,
        test_size=10,
        val_fraction=0.0,
    )
    return dataset.train


class Exact(nn.Module):
    """Go on in float64, in which rounding decides between no two weights of so short a run."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def network(norm: bool = True, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU()]
    if norm:
        layers.insert(1, nn.BatchNorm2d(6))
    layers += [nn.Dropout(dropout), nn.Flatten(), nn.Linear(72, 4)]
    return sparsify(nn.Sequential(Exact(), *layers).double(), sparsity=0.5)


def train(
    model: nn.Module, folder: Path | None = None, stop: Any = None, **changes: Any
) -> Trainer:
    options = {"epochs": 2, "batch_size": 32, "lr": 0.02, "augment": False, **changes}
    config = Training(**options)
    optimizer = make_optimizer(model, config)
    updater = RigL(model, optimizer, drop_fraction=0.3, every=4, until=100)
    options = {"optimizer": optimizer, "dst": updater, "folder": folder, "stop": stop}
    trainer = Trainer(model, images(), config, **options)
    trainer.fit()
    return trainer


class StopAt(StopRequest):
    """Be asked to stop before the end of this step, on one rank only."""

    def __init__(self, step: int, rank: int) -> None:
        super().__init__()
        self.left = step if distributed.rank() == rank else 10**6

    def asked(self) -> bool:
        self.left -= 1
        if self.left <= 0:
            self.signal = signal.SIGTERM
        return super().asked()


def normalise(rank: int, world: int) -> dict[str, Tensor]:
    """Run BatchNorm over shares of 5 images in all, which do not divide."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)[rank::world].requires_grad_()
    norm = synchronize(nn.Sequential(nn.BatchNorm2d(3))).double()
    y = norm(x)
    y.pow(3).sum().backward()
    gradients = torch.cat([norm[0].weight.grad, norm[0].bias.grad])
    dist.all_reduce(gradients)
    buffers = {name: tensor.double() for name, tensor in norm[0].named_buffers()}
    return {"y": y.detach(), "x.grad": x.grad, "gradients": gradients, **buffers}


def train_with_shared_statistics(rank: int, world: int) -> dict[str, Any]:
    trainer = train(network(), sync_batchnorm=True)
    return {"state": trainer.model.state_dict(), "rows": trainer.rows}


def accumulate(rank: int, world: int) -> dict[str, Tensor]:
    return train(network(norm=False), accumulate=3).model.state_dict()


def read_shares(rank: int, world: int) -> list[list[int]]:
    """Train on numbered images that workers load, and return those of each step."""
    seen: list[list[int]] = []

    def note(logits: Tensor, x: Tensor, y: Tensor, epoch: int) -> Tensor:
        seen.append(x[:, 0, 0, 0].int().tolist())
        return logits.sum()

    pairs = [(torch.full((1, 8, 8), float(n)), n % 4) for n in range(50)]
    config = Training(epochs=1, batch_size=16, lr=1e-6)
    source = data.Samples(pairs, workers=1)
    Trainer(network(norm=False), source, config, objective=note).fit()
    return seen


def resume(rank: int, world: int, folder: Path) -> dict[str, bool]:
    """Compare interrupted runs with an uninterrupted one, dropout and BatchNorm included."""
    straight = train(network(dropout=0.3), folder / "straight")
    expected = straight.model.state_dict()
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in straight.rows]
    equal = {}
    for step in (1, 3, 5, 7):
        where = folder / f"stopped at {step}"
        try:
            train(network(dropout=0.3), where, StopAt(step, rank=world - 1))
        except Interrupted:
            again = train(network(dropout=0.3), where)
            found = again.model.state_dict()
            same = all(torch.equal(found[name], expected[name]) for name in expected)
            found_rows = [{k: v for k, v in r.items() if "second" not in k} for r in again.rows]
            equal[f"step {step}"] = same and found_rows == rows
    return equal


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with distributed.process_group():
        rank, world = distributed.rank(), distributed.ranks()
        found = {
            scenario.__name__: scenario(rank, world)
            for scenario in (normalise, train_with_shared_statistics, accumulate, read_shares)
        }
        found["resume"] = resume(rank, world, folder)
        found["agreed"] = [distributed.any_rank(rank == 1), distributed.any_rank(False)]
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
