"""Show how training goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text


class Reporter:
    """Receive what a training run reports, and show nothing: the base of `ProgressReporter`.

    Example:
        >>> Reporter().message("nothing to see")
    """

    def plan(self, epochs: int) -> None:
        """Announce how many epochs all runs together have still to train."""

    def run(self, name: str, epochs: int, epoch: int) -> None:
        """Announce a run and the epoch it starts or goes on from."""

    def step(self, done: int, steps: int, loss: float, accuracy: float, images: int) -> None:
        """Report a step: its number in the epoch and the epoch's mean loss and accuracy so far."""

    def epoch(self, epoch: int, summary: str) -> None:
        """Report a finished epoch."""

    def message(self, text: str) -> None:
        """Print a line."""


class ProgressReporter(Reporter):
    """Show two live bars with loss, accuracy, images/s, epoch and total ETA.

    Where the console is not a terminal, print one line an epoch instead.

    Args:
        console: where to print; standard output by default.

    Example:
        >>> with ProgressReporter() as reporter:
        ...     reporter.plan(epochs=10)
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.live = self.console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            _Remaining(),
            console=self.console,
            refresh_per_second=4,
            disable=not self.live,
        )
        self._total: TaskID = self._progress.add_task("total", total=None, status="", visible=False)
        self._epoch: TaskID = self._progress.add_task("epoch", total=None, status="", visible=False)
        self._planned = 0.0
        self._done = 0.0
        self._name = ""
        self._epochs = 0
        self._epoch_number = 0
        self._images = 0
        self._started = time.monotonic()
        self._plan_started = self._started

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
        self._planned = epochs
        self._done = 0.0
        self._plan_started = time.monotonic()
        self._progress.reset(self._total, total=epochs, visible=True, status="")

    def run(self, name: str, epochs: int, epoch: int) -> None:
        self._name, self._epochs, self._epoch_number = name, epochs, epoch
        self._begin_epoch()

    def step(self, done: int, steps: int, loss: float, accuracy: float, images: int) -> None:
        self._images += images
        rate = self._images / max(time.monotonic() - self._started, 1e-9)
        self._done += 1 / steps
        self._progress.update(
            self._epoch,
            completed=done,
            total=steps,
            description=f"{self._name} epoch {self._epoch_number + 1}/{self._epochs}",
            status=f"loss {loss:.3f}  acc {accuracy:.1%}  {rate:,.0f} images/s",
            visible=True,
        )
        self._progress.update(self._total, completed=self._done)

    def epoch(self, epoch: int, summary: str) -> None:
        if not self.live:
            name = f"{self._name} epoch {epoch + 1}/{self._epochs}"
            self.message(f"{name}  {summary}  total ETA {self._eta()}")
        self._epoch_number = epoch + 1
        self._begin_epoch()

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _begin_epoch(self) -> None:
        self._images = 0
        self._started = time.monotonic()
        self._progress.reset(self._epoch, status="")

    def _eta(self) -> str:
        elapsed = time.monotonic() - self._plan_started
        if self._done == 0:
            return "?"
        return format_seconds(elapsed * max(self._planned - self._done, 0) / self._done)


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("ETA " + ("-:--:--" if left is None else format_seconds(left)), "cyan")


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
