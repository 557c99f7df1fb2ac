"""`sparsekd export`: files of a trained network for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli import options
from sparsekd.recipes.export import FILES, export
from sparsekd.recipes.loading import load_run
from sparsekd.terminal import one_line_errors


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as runs/demo/seed0/kd-0.9.")],
    to: Annotated[str, typer.Option(help="dense, onnx, torch-export, frozen or frozen-int8.")],
    out: Annotated[
        Path | None, typer.Option(help="The file; by default in the folder of the run.")
    ] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Write the network of a run as a file, checked against the run's accuracy.

    dense is a state dict of the plain torch module, onnx the dense network for any ONNX runtime,
    torch-export a program that computes with the nonzeros, frozen the fastest for inference, and
    frozen-int8 the same with smaller weights.

    \b
    sparsekd export runs/demo/seed0/kd-0.9 --to onnx
    sparsekd export runs/demo/seed0/kd-0.9 --to dense --out ticket.safetensors
    """
    with one_line_errors(ValueError):
        if to not in FILES:
            raise ValueError(f"--to: expected one of {', '.join(FILES)}, got {to!r}")
        written = export(load_run(run, data_dir), to, out or run / FILES[to])
    typer.echo(
        f"{written.path}: test accuracy {written.accuracy:.2%} of {written.images} images; "
        f"the run had {written.expected:.2%}"
    )
