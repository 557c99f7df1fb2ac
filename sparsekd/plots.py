"""The common style of all figures: colors, panels, an axis for sparsities."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.path import Path as Path2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox, BboxBase

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


@dataclass(frozen=True)
class Label:
    """A text for the point at x, y of the data."""

    text: str
    x: float
    y: float
    color: str


def label_points(axes: Axes, labels: Iterable[Label], size: float = 7) -> None:
    """Write texts beside their points, so that none covers another one or a marker.

    Each takes the place nearest to its point that is free, and rather one where it covers no line.
    Those that are far away have a thin line to their point, and one without any room is left out.
    To be called last: what moves or resizes the panel later moves points away from their texts.

    Args:
        axes: the panel, with everything drawn.
        labels: the first ones choose first.
        size: of the font, in points.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # places on the page are known from now on
    taken = _marker_boxes(axes)
    lines = _line_paths(axes)
    room = axes.bbox.padded(-3)
    written: set[tuple[str, int, int]] = set()
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y))
        if (same := (label.text, round(x), round(y))) in written:
            continue  # points at one place share a text
        written.add(same)
        note = axes.annotate(
            label.text,
            (label.x, label.y),
            (0, 0),
            textcoords="offset points",
            fontsize=size,
            color=label.color,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": label.color, "linewidth": 0.5, "shrinkB": 3},
        )
        note.set_in_layout(False)
        extent = Text.get_window_extent(note)
        width, height = extent.width, extent.height
        best: tuple[float, int, tuple[float, float], Bbox] | None = None
        for ring, dx, dy in _places(width, height):
            corner = (x + dx - width / 2, y + dy - height / 2)
            box = Bbox.from_bounds(*corner, width, height).padded(0.5)
            if best is not None and best[0] <= ring:
                break  # no place further away is better
            inside = room.count_contains(box.corners()) == 4
            if inside and not box.count_overlaps(taken):
                cost = ring + 0.8 * sum(path.intersects_bbox(box, filled=False) for path in lines)
                if best is None or cost < best[0]:
                    best = (cost, ring, (dx, dy), box)
        if best is None:
            note.remove()
            continue
        _, ring, (dx, dy), box = best
        taken.append(box)
        note.set_position((dx * 72 / figure.dpi, dy * 72 / figure.dpi))
        if ring < _RING_WITH_LINE:
            assert note.arrow_patch is not None
            note.arrow_patch.set_visible(False)


_RINGS, _DIRECTIONS, _RING_WITH_LINE = 40, 16, 3


def _places(width: float, height: float) -> Iterator[tuple[int, float, float]]:
    """Iterate over places of a box around a point, in ever wider rings from the upper right on.

    Yields:
        The ring, and where the middle of the box is, in pixels.
    """
    for ring in range(_RINGS):
        for direction in range(_DIRECTIONS):
            angle = math.pi / 4 + 2 * math.pi * direction / _DIRECTIONS
            across, up = width / 2 + 8 + 5 * ring, height / 2 + 6 + 5 * ring
            yield ring, math.cos(angle) * across, math.sin(angle) * up


def _marker_boxes(axes: Axes) -> list[BboxBase]:
    """Return what the markers of all lines cover."""
    assert axes.figure is not None
    boxes: list[BboxBase] = []
    for line in axes.lines:
        if line.get_marker() not in ("None", "", None):
            half = line.get_markersize() / 2 * axes.figure.dpi / 72
            for x, y in line.get_transform().transform(line.get_xydata()):
                boxes.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    return boxes


def _line_paths(axes: Axes) -> list[Path2D]:
    """Return the lines of a panel and its error bars, in places on the page."""
    drawn = [line for line in axes.lines if line.get_linestyle() != "None"]
    paths = [line.get_transform().transform_path(line.get_path()) for line in drawn]
    for bars in axes.collections:
        paths += [bars.get_transform().transform_path(path) for path in bars.get_paths()]
    return paths


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
