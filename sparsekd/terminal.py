"""The terminal of all commands: its width, its threads, tables that fit, errors in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from sparsekd.errors import SparsekdError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)
_THREADS_PER_PROCESSOR = 4


def console() -> Console:
    """Return a console for standard output."""
    # A log file has no width; rich would fold a table at 80 columns. Without markup, brackets stay:
    # `pip install sparsekd[onnx]` is text.
    return Console(width=None if sys.stdout.isatty() else 110, markup=False)


def set_threads(threads: int | None) -> None:
    """Set the number of torch's threads; None leaves it.

    Raises:
        ValueError: it is below 1, or so far above the number of processors that the system would
            run out of threads.
    """
    if threads is None:
        return
    processors = os.cpu_count() or 1
    most = _THREADS_PER_PROCESSOR * processors
    if not 1 <= threads <= most:
        raise ValueError(
            f"--threads: expected at least 1 and at most {most} "
            f"(this machine has {processors} processors), got {threads}"
        )
    torch.set_num_threads(threads)


class FittingThreads:
    """Sets torch's threads to the number of processors that other processes leave free.

    Threads that share a processor with another process hold up all others of a parallel loop, which
    spin meanwhile: a step on two processors, one of them busy, takes five times as long on two
    threads as it does alone, and one and a half times as long on one. Called again, it counts what
    has been busy since. Where the system does not tell (it is not Linux), nothing changes.

    Args:
        say: is told when the number changes.
        pause: seconds of watching before the first choice.
    """

    def __init__(self, say: Callable[[str], None], pause: float = 0.5) -> None:
        self._say, self._pause = say, pause
        self._most = torch.get_num_threads()
        self._last: tuple[float, float] | None = None

    def __call__(self) -> None:
        """Set the number of threads."""
        if self._last is None:
            self._last = _busy_time()
            time.sleep(self._pause)
        now = _busy_time()
        if now is None or self._last is None or now[0] <= self._last[0]:
            return
        busy = (now[1] - self._last[1]) / (now[0] - self._last[0])
        self._last = now
        threads = max(1, self._most - round(max(0.0, busy)))
        if threads != torch.get_num_threads():
            self._say(
                f"other processes keep {busy:.1f} processors busy: "
                f"{threads} of {self._most} threads; --threads {self._most} takes all"
            )
            torch.set_num_threads(threads)


def _busy_time() -> tuple[float, float] | None:
    """Return the time, and the processor time of others on the processors of this process."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    used = 0
    for name, *fields in map(str.split, lines):
        if name in own:
            user, nice, system, _, _, irq, softirq, *_ = map(int, fields)
            used += user + nice + system + irq + softirq
    return time.monotonic(), used / os.sysconf("SC_CLK_TCK") - time.process_time()


def image_shape(flag: str, text: str) -> tuple[int, int, int]:
    """Read channels, height and width.

    Raises:
        ValueError: the text is not three positive numbers; the message names the flag.

    Example:
        >>> image_shape("--input", "3,32,32")
        (3, 32, 32)
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) != 3 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{flag}: expected channels,height,width, as 3,32,32, got {text!r}")
    return int(words[0]), int(words[1]), int(words[2])


def words(flag: str, text: str) -> tuple[str, ...]:
    """Read words with commas between them.

    Raises:
        ValueError: there is none; the message names the flag.

    Example:
        >>> words("--level", "layer, step")
        ('layer', 'step')
    """
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found:
        raise ValueError(f"{flag}: expected at least one, got {text!r}")
    return found


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """Read numbers with commas between them.

    Raises:
        ValueError: there is none, or something else; the message names the flag.

    Example:
        >>> numbers("--sparsity", "0.8,0.9")
        (0.8, 0.9)
    """
    try:
        return tuple(map(float, words(flag, text)))
    except ValueError:
        raise ValueError(f"{flag}: expected numbers, as 0.8,0.9, got {text!r}") from None


class OneLineGroup(TyperGroup):
    """Commands whose every error is one line on standard error.

    Mistakes on the command line and errors that sparsekd raises on purpose end with exit status 2,
    a second Ctrl-C with 130.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        standalone = options.pop("standalone_mode", True)
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
        except typer.Abort:
            code = 130
        except (SparsekdError, OSError) as error:
            code = _say(error, 2)
        except MemoryError as error:
            code = _say(f"not enough memory: {error}", 1)
        except Exception as error:
            if hasattr(error, "format_message"):  # what a command-line parser raises has one
                code = _show_usage(error)
            elif "allocate memory" in str(error):  # torch raises RuntimeError
                code = _say(f"not enough memory: {error}", 1)
            else:
                raise
        if not standalone:
            return code
        sys.exit(code if isinstance(code, int) else 0)


_GAP = 2
_NARROWEST = 8  # a name that is longer is broken into lines of at least this width


@dataclass(frozen=True)
class Columns:
    """A table that loses nothing on a narrow terminal.

    Columns that do not fit beside the first one, which names the lines, follow in a table below,
    with the names again. Nothing is cut: a name or a sentence that is too wide goes on in the next
    line.

    Args:
        header: of the columns.
        rows: of cells.
        title: above the table.
        note: below it.
        left: columns aligned left; numbers are on the right.
        sections: rows that begin one, below a blank line.

    Example:
        >>> table = Columns(("layer", "ms"), [("layer1.0.conv1", "12.5")])
        >>> Console(width=30).print(table)
        layer             ms
        ────────────────────
        layer1.0.conv1  12.5
        <BLANKLINE>
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    left: int = 1
    sections: Collection[int] = ()

    @property
    def row_count(self) -> int:
        """Number of lines below the header."""
        return len(self.rows)

    def groups(self, width: int) -> list[list[int]]:
        """Divide the columns behind the first into tables of at most this width."""
        names, *widths = self._widths(width)
        groups: list[list[int]] = []
        room = 0
        for number, wide in enumerate(widths, start=1):
            if not groups or wide + _GAP > room:
                groups.append([])
                room = width - names
            groups[-1].append(number)
            room -= wide + _GAP
        return groups or [[]]

    def _widths(self, width: int) -> list[int]:
        """Return the width of each column; titles break at spaces, and names where they must."""
        columns = [[name, *cells] for name, *cells in zip(self.header, *self.rows, strict=True)]
        whole = [max(map(len, cells)) for cells in columns]
        if sum(whole) + _GAP * (len(whole) - 1) <= width:
            return whole
        names, *others = (max(map(len, [*name.split(), *cells])) for name, *cells in columns)
        room = width - _GAP - max(others, default=0)
        names = min(names, room if room >= _NARROWEST else max(_NARROWEST, width // 2))
        return [names, *(min(other, max(_NARROWEST, width - _GAP - names)) for other in others)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="italic")
        widths = self._widths(options.max_width)
        for group in self.groups(options.max_width):
            table = Table(
                box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0)
            )
            for column in (0, *group):
                name, wide = Text(self.header[column]), widths[column]
                side: JustifyMethod = "left" if column < self.left else "right"
                table.add_column(name, justify=side, overflow="fold", width=wide)
            for number, row in enumerate(self.rows):
                if number in self.sections:
                    table.add_section()
                table.add_row(*(Text(row[column]) for column in (0, *group)))
            yield table
            yield Text()
        if self.note:
            yield Text(self.note, style="dim")


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the process with exit status 2 and one line on standard error if one of these occurs."""
    try:
        yield
    except kinds as error:
        fail(error, code=2)


@contextlib.contextmanager
def warnings_by_kind(say: Callable[[str], None]) -> Iterator[None]:
    """Say the first warning of each kind, and at the end how many more there were.

    Warnings of a kind come from one line of code, with other numbers or layers: a run that trains
    thirty tickets would repeat them thirty times.

    Args:
        say: prints a line.
    """
    kinds: dict[tuple[str, int], dict[str, None]] = {}

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        # Not the place that a warning names, which is the caller at fault: where it was raised.
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == "warnings" and frame.f_back is not None:
            frame = frame.f_back
        texts = kinds.setdefault((frame.f_code.co_filename, frame.f_lineno), {})
        if not texts:
            say(f"warning: {message}")
        texts[str(message)] = None

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        for first, *more in kinds.values():
            if more:
                start = textwrap.shorten(first, 75, placeholder=" ...")
                say(f"warning: {len(more)} more of the kind: {start}")


@contextlib.contextmanager
def disk_errors(flag: str, place: Path) -> Iterator[None]:
    """End the process likewise if a file cannot be written, and say what to do about it.

    Args:
        flag: that chooses the place.
        place: that is written to.
    """
    try:
        yield
    except OSError as error:
        what = ""
        if error.errno in _FULL:
            what = f"; free some space and the same command goes on; what {place} holds is intact"
        if error.errno in _REFUSED:
            what = f"; choose a folder that can be written by {flag}"
        fail(f"{error}{what}", code=2)


def fail(error: Exception | str, code: int) -> NoReturn:
    """End the process with an exit status and one line on standard error."""
    raise typer.Exit(_say(error, code))


def _say(error: Exception | str, code: int) -> int:
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    return code


def _show_usage(error: Any) -> int:
    """Show what a command-line parser raised: a mistake in one line, or the help asked for."""
    context, message = getattr(error, "ctx", None), str(error.format_message())
    if context is not None and message == context.get_help():
        typer.echo(message)  # a group of commands, called without one
        return 0
    command = "sparsekd" if context is None else context.command_path
    return _say(f"{message.rstrip('.')}; see `{command} --help`", 2)
