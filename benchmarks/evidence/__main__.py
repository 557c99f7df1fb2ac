"""Run the studies, or go on where they stopped; write their rows and tables; --help lists options.

A study has a folder in --out with a run folder a column, which `sparsekd report` reads too, and
after each call `rows.jsonl` (a line a finished run), `README.md` (all of them, and the paired
differences) and their figure. --draw makes page and figure anew from rows alone. Settings are in
studies.py and in nothing else. --wall trains the first seed of a study's first column once more by
the sparse kernels and once by dense ones, for the time it takes; --epochs cuts that short.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.evidence import figure, summary
from benchmarks.evidence.studies import STUDIES, Study
from sparsekd import ops, terminal
from sparsekd.data import Dataset, Source, Split
from sparsekd.memory import keep_memory_warm
from sparsekd.plots import save
from sparsekd.recipes import Experiment, Recipe, RunFolder, check, load_data
from sparsekd.train import Interrupted, MetricsLog, ProgressReporter, Reporter, StopRequest

Run = Callable[[Recipe, Path, int], None]


def run_study(name: str, study: Study, folder: Path, run: Run) -> None:
    """Train what has not finished of a study, and write its rows and tables.

    Args:
        name: of the study.
        study: its settings.
        folder: of the study.
        run: trains a recipe in a folder, on images pooled over patches of a side.
    """
    most = max(recipe.seeds for recipe in study.columns.values())
    for seeds in range(1, most + 1):  # a seed of every column, then the next: pairs come early
        for column, recipe in study.columns.items():
            run(replace(recipe, seeds=min(seeds, recipe.seeds)), folder / column, study.pool)
            summary.write(summary.collect(name, study.columns, folder), folder / "rows.jsonl")
            draw(name, study, folder)


def draw(name: str, study: Study, folder: Path) -> None:
    """Write the page of a study and its figure from the rows in its folder."""
    rows = MetricsLog(folder / "rows.jsonl").rows()
    (folder / "README.md").write_text(summary.page(name, study, rows))
    save({"differences": figure.differences(study, rows)}, folder)


def run_wall(name: str, study: Study, folder: Path, run: Run, epochs: int | None = None) -> None:
    """Train a seed of a study's first column by sparse and by dense kernels; write the seconds.

    Args:
        name: of the study.
        study: its settings.
        folder: of the study.
        run: trains a recipe in a folder.
        epochs: of each run, which updates its topology as often as the study does; None for all.
    """
    rows = []
    column, recipe = next(iter(study.columns.items()))
    if epochs is not None:
        recipe = replace(recipe.with_epochs(epochs), dynamics=recipe.dynamics)
    for backend in ("sparse", "dense"):
        forced = ops.backend("dense") if backend == "dense" else contextlib.nullcontext()
        with forced:
            run(replace(recipe, seeds=1), folder / backend / column, study.pool)
        found = summary.collect(name, [column], folder / backend)
        rows += [{"backend": backend, **row} for row in found]
    summary.write(rows, folder / "rows.jsonl")
    print(summary.times(rows))


def train(
    recipe: Recipe,
    folder: Path,
    pool: int,
    data_dir: Path | None,
    reporter: Reporter,
    stop: StopRequest,
) -> None:
    """Train the open runs of a recipe in a folder."""
    data = pooled(load_data(recipe.data, data_dir), pool)
    check(recipe, data)
    with RunFolder(folder, recipe) as opened:
        Experiment(recipe, data, opened, reporter=reporter, stop=stop).run()


def pooled(data: Dataset, side: int) -> Dataset:
    """Return a data set whose pixels are the means of patches; mean and deviation stay as read."""
    if side == 1:
        return data

    def smaller(split: Source) -> Split:
        assert isinstance(split, Split), "expected a data set in memory"
        return replace(
            split,
            images=functional.avg_pool2d(split.images[torch.arange(len(split))].float(), side),
        )

    channels, height, width = data.input_shape
    return replace(
        data,
        input_shape=(channels, height // side, width // side),
        train=smaller(data.train),
        val=smaller(data.val),
        test=smaller(data.test),
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.evidence", description=__doc__)
    parser.add_argument("study", nargs="*", help=f"{', '.join(STUDIES)}; by default all")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--data-dir", type=Path, help="folder of the data files")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--wall", action="store_true", help="measure time instead of accuracy")
    parser.add_argument("--epochs", type=int, help="with --wall, of each run, instead of all")
    parser.add_argument("--draw", action="store_true", help="only draw again, from rows.jsonl")
    parser.add_argument(
        "--smoke", action="store_true", help="a few hundred images: shows only that it runs"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.study) - STUDIES.keys():
        parser.error(f"study: expected names among {', '.join(STUDIES)}, got {sorted(unknown)}")
    if options.epochs is not None and not (options.wall and options.epochs > 0):
        parser.error(
            "--epochs: expected at least 1, and --wall; studies.py says how long studies are"
        )
    if options.draw:
        for name in options.study or STUDIES:
            draw(name, STUDIES[name], options.out / name)
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_memory_warm()
    work = partial(run_wall, epochs=options.epochs) if options.wall else run_study
    out = options.out / "smoke" if options.smoke else options.out
    with StopRequest() as stop, ProgressReporter(terminal.console()) as reporter:

        def run(recipe: Recipe, folder: Path, pool: int) -> None:
            reporter.message(f"{folder}: {recipe.description}")
            train(recipe, folder, pool, options.data_dir, reporter, stop)

        try:
            for name in options.study or STUDIES:
                study = STUDIES[name].shortened() if options.smoke else STUDIES[name]
                work(name, study, (out / "wall" if options.wall else out) / name, run)
        except Interrupted as interruption:
            raise SystemExit(f"{interruption}; the same command goes on from {out}") from None


if __name__ == "__main__":
    main()
