"""Stop a run cleanly: a first Ctrl-C asks, the training loop answers at the next step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from sparsekd.train import distributed


class Interrupted(Exception):
    """Report that a run stopped on request after it had saved its state."""


class StopRequest:
    """Turn SIGINT and SIGTERM into a flag while the context is open.

    A second signal acts at once, as it would without this context; the state saved last is intact
    because every file is written atomically.

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
        """Say whether any process was asked to stop; in a distributed run every rank calls it."""
        return distributed.any_rank(self.signal is not None)

    def check(self, note: str = "") -> None:
        """Raise if a stop was asked for; call it where nothing needs to be saved.

        Args:
            note: what to add to the message.

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
