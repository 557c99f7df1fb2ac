"""Progress of training: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

_SECONDS_BETWEEN_LINES = 60


class Reporter:
    """The interface through which a training run reports; this base class shows nothing.

    Example:
        >>> Reporter().message("nothing to see")
    """

    def plan(self, epochs: int) -> None:
        """Announce the total number of epochs of all runs to come."""

    def run(self, name: str, epochs: int, epoch: int, done: int = 0) -> None:
        """Announce a run: its number of epochs, the epoch it starts at, and how many are done."""

    def step(self, done: int, steps: int, loss: float, accuracy: float, images: int) -> None:
        """Report a step: its number in the epoch, and the epoch's mean loss and accuracy so far."""

    def epoch(self, epoch: int, summary: str) -> None:
        """Report a finished epoch, counted from 0."""

    def message(self, text: str) -> None:
        """Print a line."""


class ProgressReporter(Reporter):
    """Two live bars with loss, accuracy, images/s, epoch and total ETA.

    If the console is not a terminal, a line is printed after every epoch and every minute instead.

    Args:
        console: to print on; standard output by default.

    Example:
        >>> with ProgressReporter() as reporter:
        ...     reporter.plan(epochs=10)
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.live = self.console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            console=self.console,
            refresh_per_second=4,
            disable=not self.live,
        )
        self._bars = {
            name: self._progress.add_task(name, total=None, status="", visible=False)
            for name in ("epoch", "total")
        }
        self._name = ""
        self._epochs = self._number = 0
        self._planned = self._finished = self._skipped = 0
        self._images = 0
        self._plan_start = self._epoch_start = self._last_line = time.monotonic()
        self._first_step: int | None = None

    def __enter__(self) -> ProgressReporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def plan(self, epochs: int) -> None:
        self._planned, self._finished, self._skipped = epochs, 0, 0
        self._plan_start = time.monotonic()

    def run(self, name: str, epochs: int, epoch: int, done: int = 0) -> None:
        self._name, self._epochs, self._number = name, epochs, epoch
        self._finished += done
        self._skipped += done
        self._begin_epoch()

    def step(self, done: int, steps: int, loss: float, accuracy: float, images: int) -> None:
        now = time.monotonic()
        self._images += images
        if self._first_step is None:  # above 0 if the run was interrupted within this epoch
            self._first_step = done - 1
        elapsed = max(now - self._epoch_start, 1e-9)
        rate = self._images / elapsed
        epoch_eta = format_seconds(elapsed * (steps - done) / (done - self._first_step))
        status = f"loss {loss:.3f}  acc {accuracy:.1%}  {rate:,.0f} images/s"
        total_eta = self._total_eta(done / steps)
        if self.live:
            self._show("epoch", self._title(), done, steps, f"{status}  ETA {epoch_eta}")
            position = self._finished + done / steps
            self._show("total", "total", position, self._planned, f"ETA {total_eta}")
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            where = f"{self._title()} step {done}/{steps}"
            self._line(f"{where}  {status}  ETA epoch {epoch_eta}, total {total_eta}")

    def epoch(self, epoch: int, summary: str) -> None:
        self._finished += 1
        if not self.live:
            self._line(f"{self._title()}  {summary}  ETA total {self._total_eta(0)}")
        self._number = epoch + 1
        self._begin_epoch()

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _begin_epoch(self) -> None:
        self._images, self._first_step = 0, None
        self._epoch_start = time.monotonic()

    def _title(self) -> str:
        return f"{self._name} epoch {self._number + 1}/{self._epochs}"

    def _show(self, bar: str, title: str, done: float, total: float, status: str) -> None:
        self._progress.update(
            self._bars[bar],
            description=title,
            completed=done,
            total=total,
            status=status,
            visible=True,
        )

    def _line(self, text: str) -> None:
        self.message(text)
        self._last_line = time.monotonic()

    def _total_eta(self, part: float) -> str:
        """Extrapolate from the epochs trained since `plan`, the current one in part."""
        trained = self._finished - self._skipped + part
        elapsed = time.monotonic() - self._plan_start
        left = max(self._planned - self._finished - part, 0)
        return format_seconds(elapsed * left / max(trained, 1e-9))


def format_seconds(seconds: float) -> str:
    """Format a duration as h:mm:ss.

    Args:
        seconds: the duration.

    Returns:
        The text.

    Example:
        >>> format_seconds(3725.2)
        '1:02:05'
    """
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
