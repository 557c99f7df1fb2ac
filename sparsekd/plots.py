"""The common style of all figures: colors, panels, an axis for sparsities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"


def line_style(number: int) -> dict[str, Any]:
    """Return the style of the line of a number; the first 21 differ.

    Example:
        >>> line_style(0)["marker"], line_style(7)["linestyle"]
        ('o', '--')
    """
    cycle = number // len(COLORS)
    return {
        "color": COLORS[number % len(COLORS)],
        # another marker in each color as well: a single point has no line to tell it by
        "marker": MARKERS[(number + 3 * cycle) % len(MARKERS)],
        "linestyle": ("-", "--", ":")[cycle % 3],
    }


def stretched(sparsity: float) -> float:
    """Place a sparsity on an axis: equal steps for equal factors of density.

    Example:
        >>> round(stretched(0.9), 6), round(stretched(0.99), 6), round(stretched(0.999), 6)
        (1.0, 2.0, 3.0)
    """
    return -math.log10(1 - sparsity)


def sparsity_axis(
    axes: Axes, sparsities: Sequence[float], label: Callable[[float], str], **style: Any
) -> None:
    """Put a tick at each sparsity and nowhere else."""
    axes.xaxis.set_major_locator(FixedLocator([stretched(s) for s in sparsities]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([label(s) for s in sparsities], **style)


def single_axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Make a figure of one panel."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    clean(axes)
    return figure, axes


def panel_grid(panels: int, xlabel: str, ylabel: str) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels, three a line at most, with labels at its left and lower edge.

    Example:
        >>> len(panel_grid(4, "sparsity", "accuracy")[1])
        4
    """
    columns = min(3, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(4.0 * columns + 0.4, 3.4 * lines + 0.5), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for number, axes in enumerate(grid):
        if number >= panels:
            axes.remove()
            continue
        clean(axes)
        if number % columns == 0:
            axes.set_ylabel(ylabel)
        if number + columns >= panels:  # nothing below it
            axes.set_xlabel(xlabel)
    return figure, grid[:panels]


def clean(axes: Axes) -> None:
    """Draw a faint grid and no frame."""
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save(figures: Mapping[str, Figure | None], folder: Path) -> list[Path]:
    """Write figures as PNG files.

    Args:
        figures: by the name of the file; None is left out.
        folder: made if it is not there.

    Returns:
        The files written.

    Example:
        >>> save({"nothing": None}, Path("."))
        []
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        if figure is not None:
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=150)
    return files
