"""How near the prediction of `sparsekd advise` comes to the step that is then measured.

Models of several families, each with three aims. Every plan that was measured gives a row, those
that missed their aim too; the table is made from the rows. What has rows is not measured again, so
that a machine which is quiet for a minute at a time measures all of them one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from sparsekd import models
from sparsekd.bench import machine
from sparsekd.bench.advise import advise
from sparsekd.bench.tables import Grid, percent
from sparsekd.errors import SparsekdError
from sparsekd.terminal import console, one_line_errors, set_threads
from sparsekd.train import MetricsLog, Row
from tools.packages import load_package

AIMS = ("time=0.7", "time=0.5", "time=0.3")


@dataclass(frozen=True)
class Network:
    """A model with random weights, and its example inputs."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]


def _images(batch: int, size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, 3, size, size)


def _vit() -> nn.Module:
    timm = load_package("timm")
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 256, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", depth=6, num_classes=10, **sizes)


def _torchvision_resnet50() -> nn.Module:
    return load_package("torchvision").models.resnet50(num_classes=10)


def _bert() -> nn.Module:
    transformers = load_package("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=4, **sizes))


NETWORKS = {
    "resnet18": Network(models.resnet18, _images(8, 32)),
    "wrn22_2": Network(models.wrn22_2, _images(16, 32)),
    "vgg16_bn": Network(models.vgg16_bn, _images(8, 32)),
    "timm ViT": Network(_vit, _images(4, 32)),
    "torchvision resnet50": Network(_torchvision_resnet50, _images(4, 64)),
    "transformers BERT": Network(_bert, lambda: torch.randint(0, 30000, (4, 64))),
}


def measure(name: str, aim: str, rounds: int) -> list[Row]:
    """Advise on a network; return a row for each plan that was measured."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    advice = advise(network.build(), network.inputs(), aim=aim, rounds=rounds)
    return [
        {
            "network": name,
            "aim": aim,
            "sparsity": trial.plan.sparsity,
            "sparse": sum(layer.layout is not None for layer in trial.plan.layers),
            "layers": len(trial.plan.layers),
            "dense_ms": trial.before.ms,
            "predicted_ms": trial.predicted.ms,
            "ms": trial.measured.ms,
            "predicted_mib": trial.predicted.bytes / 2**20,
            "mib": trial.measured.bytes / 2**20,
            "machine": machine.describe(),
        }
        for trial in advice.trials
    ]


def grid(rows: list[Row]) -> Grid:
    """Tabulate the latest rows of each network and aim."""
    table = Grid(
        "Steps predicted and measured",
        ["model", "aim", "sparsity", "sparse layers", "dense, ms", "predicted", "measured", "off"],
    )
    latest = {(row["network"], row["aim"], row["sparsity"]): row for row in rows}
    for (name, aim, sparsity), row in latest.items():
        table.lines.append(
            [
                name,
                aim,
                percent(sparsity),
                f"{row['sparse']} of {row['layers']}",
                *(f"{row[key]:.1f}" for key in ("dense_ms", "predicted_ms", "ms")),
                f"{row['predicted_ms'] / row['ms'] - 1:+.1%}",
            ]
        )
    return table


def main(
    network: Annotated[str | None, typer.Option(help="Only these, as resnet18,wrn22_2.")] = None,
    aim: Annotated[str, typer.Option(help="Aims, as time=0.7,time=0.5.")] = ",".join(AIMS),
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each step.")] = 7,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    rows: Annotated[Path, typer.Option(help="JSON-lines file.")] = Path("runs/advice.jsonl"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what has rows.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Measure nothing; show the rows.")] = False,
) -> None:
    """Predict training steps, measure them, and say how far apart they are."""
    log = MetricsLog(rows)
    known = set() if fresh else {(row["network"], row["aim"]) for row in log.rows()}
    names = network.split(",") if network else list(NETWORKS)
    with one_line_errors(SparsekdError, ValueError):
        if unknown := [name for name in names if name not in NETWORKS]:
            raise ValueError(f"--network: expected some of {', '.join(NETWORKS)}, got {unknown[0]}")
        set_threads(threads)
        for pair in () if draw else product(names, aim.split(",")):
            for row in () if pair in known else measure(*pair, rounds):
                log.append(row)
    console().print(grid(log.rows()).rich())


if __name__ == "__main__":
    sys.argv[0] = "python -m benchmarks.advice"
    typer.run(main)
