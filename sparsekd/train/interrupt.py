"""Clean interruption of a run: the first Ctrl-C sets a flag, which the training loop checks."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from sparsekd.train import distributed


class Interrupted(Exception):
    """The end of a run that was asked to stop and has saved its state."""


class StopRequest:
    """A flag that SIGINT and SIGTERM set while the context is open.

    A second signal acts immediately, as it would without this context; the state saved last is
    intact, because every file is written atomically.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.check()
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def asked(self) -> bool:
        """Return whether any process was asked to stop; all ranks of a run must call it."""
        return distributed.any_rank(self.signal is not None)

    def check(self, note: str = "") -> None:
        """Raise if a stop was asked for; call it where nothing is left to save.

        Args:
            note: text to append to the message.

        Raises:
            Interrupted: a stop was asked for.
        """
        if self.asked():
            name = "another process" if self.signal is None else self.signal.name
            raise Interrupted(f"stopped by {name}{note}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
