"""The command `sparsekd analyze`: run a study, or go on with it, and draw its figures."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sparsekd import data, terminal
from sparsekd.analysis import bases, bootstrap, flow
from sparsekd.analysis.bases.study import PRESETS as BASIS_PRESETS
from sparsekd.analysis.bootstrap.study import PRESETS as BOOTSTRAP_PRESETS
from sparsekd.analysis.flow.study import PRESETS as FLOW_PRESETS
from sparsekd.analysis.folder import StudyFolder
from sparsekd.errors import DataError, SparsekdError, UnsupportedError
from sparsekd.memory import keep_memory_warm
from sparsekd.terminal import fail, one_line_errors
from sparsekd.train import Interrupted, ProgressReporter, StopRequest

app = typer.Typer(
    help="""Study what sparse networks learn: each study resumes, and redraws its figures.

    \b
    sparsekd analyze gradient-flow
    sparsekd analyze bases --preset full --data-dir ~/data
    """,
    no_args_is_help=True,
)
_INTERRUPTED = 130


@dataclass(frozen=True)
class Study:
    """A study as the command line sees it.

    Args:
        presets: settings by name.
        runner: settings, data set, folder -> what runs it.
        figure: name of the module with `figures` and `table`, which take rows. It is loaded when it
            draws: matplotlib takes half a second, which no other command should wait for.
    """

    presets: Mapping[str, Any]
    runner: Callable[..., Any]
    figure: str


_Preset = Annotated[str, typer.Option(help="small, in minutes, or full, in hours.")]
_DataDir = Annotated[Path | None, typer.Option(help="Folder of the data files.")]
_Out = Annotated[Path, typer.Option(help="Folder of the study.")]
_Seeds = Annotated[int | None, typer.Option(help="Number of seeds.")]
_Epochs = Annotated[int | None, typer.Option(help="Epochs of a run.")]
_Networks = Annotated[
    str | None, typer.Option("--network", help="Some of the preset's networks, as lenet300_100.")
]
_Sparsity = Annotated[str | None, typer.Option(help="Sparsities, as 0.9,0.98.")]
_Fresh = Annotated[bool, typer.Option("--fresh/--resume", help="Start over instead of going on.")]
_Threads = Annotated[int | None, typer.Option(help="Threads of torch.")]
_Formats = Annotated[
    str, typer.Option("--format", help="File formats of the figures, as pdf,svg,png.")
]


_FLOW = Study(FLOW_PRESETS, flow.GradientFlowStudy, "sparsekd.analysis.flow.figure")
_BASES = Study(BASIS_PRESETS, bases.BasisStudy, "sparsekd.analysis.bases.figure")
_BOOTSTRAP = Study(
    BOOTSTRAP_PRESETS, bootstrap.BootstrapStudy, "sparsekd.analysis.bootstrap.figure"
)


@app.command("gradient-flow")
def gradient_flow(
    preset: _Preset = "small",
    data_dir: _DataDir = None,
    networks: _Networks = None,
    sparsity: _Sparsity = None,
    seeds: _Seeds = None,
    epochs: _Epochs = None,
    out: _Out = Path("runs/gradient-flow"),
    fresh: _Fresh = False,
    threads: _Threads = None,
    formats: _Formats = "png",
) -> None:
    """Compare gradient norms, and lottery tickets with the solution they were pruned from.

    \b
    sparsekd analyze gradient-flow
    sparsekd analyze gradient-flow --preset full --network lenet300_100 --seeds 3
    sparsekd analyze gradient-flow --preset published --sparsity 0.95
    """
    changes = {"networks": networks, "sparsities": sparsity, "seeds": seeds, "epochs": epochs}
    _run(_FLOW, preset, changes, out, data_dir, fresh, threads, formats)


@app.command("bases")
def generalized_tickets(
    preset: _Preset = "small",
    data_dir: _DataDir = None,
    networks: _Networks = None,
    density: Annotated[str | None, typer.Option(help="Shares to keep, as 0.1,0.02.")] = None,
    seeds: _Seeds = None,
    epochs: _Epochs = None,
    timing: Annotated[bool, typer.Option(help="Time a step of every ticket at the end.")] = True,
    out: _Out = Path("runs/bases"),
    fresh: _Fresh = False,
    threads: _Threads = None,
    formats: _Formats = "png",
) -> None:
    """Prune and train tickets in six bases: which one needs fewest numbers?

    \b
    sparsekd analyze bases
    sparsekd analyze bases --density 0.1,0.02 --seeds 3 --no-timing
    """
    changes = {"networks": networks, "densities": density, "seeds": seeds, "epochs": epochs}
    last = bases.BasisStudy.time if timing else None
    _run(_BASES, preset, changes, out, data_dir, fresh, threads, formats, last)


@app.command("bootstrap")
def deep_bootstrap(
    preset: Annotated[
        str, typer.Option(help="small, full, or held-out for real images.")
    ] = "small",
    data_dir: _DataDir = None,
    sparsity: _Sparsity = None,
    seeds: _Seeds = None,
    out: _Out = Path("runs/bootstrap"),
    fresh: _Fresh = False,
    threads: _Threads = None,
    formats: _Formats = "png",
) -> None:
    """Train on samples that repeat, and on fresh ones: does density change the gap or the speed?

    \b
    sparsekd analyze bootstrap
    sparsekd analyze bootstrap --preset held-out --data-dir ~/data --sparsity 0.9,0.98
    """
    changes = {"sparsities": sparsity, "seeds": seeds}
    _run(_BOOTSTRAP, preset, changes, out, data_dir, fresh, threads, formats)


def _config(presets: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> Any:
    """Return a preset with the fields that options name changed."""
    if name not in presets:
        raise ValueError(f"--preset: expected one of {', '.join(presets)}, got {name!r}")
    given = {field: value for field, value in changes.items() if value is not None}
    for field, value in given.items():
        if field == "networks":
            given[field] = _some(value, presets[name].networks)
        elif isinstance(value, str):
            given[field] = _fractions(field, value)
        elif value < 1:
            raise ValueError(f"{field}: expected at least 1, got {value}")
    return replace(presets[name], **given)


def _some(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if unknown := set(names) - set(known):
        raise ValueError(f"--network: expected some of {', '.join(known)}, got {min(unknown)!r}")
    return names


def _fractions(field: str, text: str) -> tuple[float, ...]:
    found = terminal.numbers(field, text)
    for number in found:
        if not 0 < number < 1:
            raise ValueError(f"{field}: expected numbers in (0, 1), got {number}")
    return found


def _run(
    study: Study,
    preset: str,
    changes: Mapping[str, Any],
    path: Path,
    data_dir: Path | None,
    fresh: bool,
    threads: int | None,
    formats: str,
    last: Callable[[Any], None] | None = None,
) -> None:
    from sparsekd.plots import parse_formats, save

    figure = importlib.import_module(study.figure)
    console = terminal.console()
    with one_line_errors(ValueError, UnsupportedError):
        forms = parse_formats(formats)
        config = _config(study.presets, preset, changes)
        terminal.set_threads(threads)
    with (
        one_line_errors(SparsekdError),
        terminal.disk_errors("--out", path),
        contextlib.ExitStack() as stack,
    ):
        keep_memory_warm()
        stop = stack.enter_context(StopRequest())
        dataset = _load(config, data_dir)
        folder = stack.enter_context(StudyFolder(path, config, fresh=fresh))
        reporter = stack.enter_context(ProgressReporter(console))
        stack.enter_context(terminal.warnings_by_kind(reporter.message))
        try:
            work = study.runner(config, dataset, folder, reporter=reporter, stop=stop)
            work.run()
            if last is not None:
                last(work)
        except Interrupted as interruption:
            typer.echo(f"{interruption}; the same command goes on from {path}")
            raise typer.Exit(_INTERRUPTED) from None
        except FloatingPointError as error:
            fail(error, code=1)
    rows = folder.rows()
    head, *lines = figure.table(rows)
    console.print(terminal.Columns(head, lines))
    for file in [*save(figure.figures(rows), path / "figures", forms), path / "rows.jsonl"]:
        console.print(str(file), highlight=False, soft_wrap=True)


def _load(config: Any, root: Path | None) -> data.Dataset | None:
    """Load the data set of a study, with as many training images as it asks for."""
    if config.data == "mixture":
        return None
    dataset = data.load(config.data, root=root, val_fraction=0)
    count = config.train_images
    if count is None:
        return dataset
    if not 1 <= count <= len(dataset.train):
        raise DataError(f"train_images: expected 1 to {len(dataset.train)}, got {count}")
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    return replace(dataset, train=dataset.train.subset(order[:count].sort().values))
