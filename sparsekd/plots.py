"""The common style of all figures: colors, panels, an axis for sparsities."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from sparsekd.errors import UnsupportedError

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
FORMATS = ("png", "pdf", "svg")


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
    columns = 2 if panels == 4 else min(3, panels)
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
    """Draw a faint grid behind everything, and no frame."""
    axes.set_axisbelow(True)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def log_axis(
    axis: Axis, label: Callable[[float], str], steps: Sequence[float] = (1.0, 2.0, 5.0)
) -> None:
    """Make an axis logarithmic, with a label at one, two and five times a power of ten.

    Args:
        axis: of x or y.
        label: writes a number.
        steps: what powers of ten are multiplied by instead; (1.0,) where there are many of them.
    """
    axes = axis.axes
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axis.set_minor_locator(NullLocator())


def deviations(groups: Sequence[Sequence[float]]) -> list[float] | None:
    """Return the standard deviation of each group, for error bars; None where all have one value.

    Example:
        >>> deviations([[1.0, 3.0], [2.0]]), deviations([[1.0], [2.0]])
        ([1.4142135623730951, 0.0], None)
    """
    if all(len(group) < 2 for group in groups):
        return None
    return [statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups]


def low_legend(axes: Axes, columns: int, **style: Any) -> None:
    """Put a legend below a panel, where it hides nothing."""
    below = -0.22 if axes.get_xlabel() else -0.1
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, below)}
    axes.legend(ncols=columns, frameon=False, **place, **style)


def top_legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """Put a legend above all panels, in as many columns as fit the figure."""
    longest = max(map(len, names), default=1)
    columns = int(figure.get_figwidth() / (0.6 + 0.085 * longest))  # inches of line and text
    columns = max(1, min(columns, len(names)))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)


def parse_formats(text: str) -> tuple[str, ...]:
    """Read formats of figures.

    Raises:
        UnsupportedError: one is not known.

    Example:
        >>> parse_formats("pdf,svg")
        ('pdf', 'svg')
    """
    formats = tuple(word.strip() for word in text.split(",") if word.strip())
    for word in formats or ("",):
        if word not in FORMATS:
            raise UnsupportedError(f"format: expected some of {', '.join(FORMATS)}, got {word!r}")
    return formats


def save(
    figures: Mapping[str, Figure | None], folder: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Write figures as files; text in PDF and SVG files stays text.

    Args:
        figures: by the name of the file; None is left out.
        folder: made if it is not there.
        formats: some of `FORMATS`, a file each.

    Returns:
        The files written.

    Example:
        >>> save({"nothing": None}, Path("."))
        []
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        for name, figure in figures.items():
            for form in formats if figure is not None else ():
                assert figure is not None
                files.append(folder / f"{name}.{form}")
                figure.savefig(files[-1], dpi=150)
    return files
