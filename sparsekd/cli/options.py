"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[str | None, typer.Option(help="Data set instead of the recipe's.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder of the data files.")]
Sparsity = Annotated[str | None, typer.Option(help="Sparsities, as 0.9,0.98.")]
Seeds = Annotated[int | None, typer.Option(help="Number of seeds.")]
FirstSeed = Annotated[int | None, typer.Option(help="The first of them; by default 0.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs; the whole schedule scales with them.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the runs; by default runs/RECIPE.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any field, as training.lr=0.05; repeatable.")
]
Fresh = Annotated[bool, typer.Option("--fresh/--resume", help="Start over instead of going on.")]
Threads = Annotated[int | None, typer.Option(help="Threads of torch.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that decode images; by default one a processor, at most 4."),
]
Backend = Annotated[
    str | None, typer.Option(help="Backend of the sparse ops: auto, cpp, dense or reference.")
]
Log = Annotated[
    str | None,
    typer.Option(help="Metrics besides metrics.jsonl: csv (epochs.csv), tensorboard."),
]
