"""The folder of a study: what it was asked for, and the rows it has measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar, Protocol

import torch

from sparsekd.errors import CheckpointError
from sparsekd.train import MetricsLog, Row, write_atomic
from sparsekd.train.working_folder import lock_folder, remove_unfinished


class Config(Protocol):
    """A frozen dataclass of a study's settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    grid: ClassVar[tuple[str, ...]]
    """Fields that may change between two calls: the jobs that are done stay valid."""


class StudyFolder:
    """A folder with config.json, rows.jsonl, what jobs leave for other jobs, and figures.

    A study is a list of jobs. The rows of a job are written together once it is done, so opening
    the folder again goes on at the first job that is missing.

    Args:
        path: the folder; created if missing.
        config: the study's settings; those outside `grid` have to be those of the last call.
        fresh: first delete what an earlier study left here.

    Raises:
        CheckpointError: the folder holds another study, is damaged, or is in use.

    Example:
        >>> import tempfile
        >>> from sparsekd.analysis import GradientFlow
        >>> with StudyFolder(Path(tempfile.mkdtemp()), GradientFlow()) as folder:
        ...     folder.finish("job", [{"kind": "result", "accuracy": 0.5}])
        ...     folder.done("job"), folder.rows("result")
        (True, [{'kind': 'result', 'run': 'job', 'accuracy': 0.5}])
    """

    def __init__(self, path: Path, config: Config, *, fresh: bool = False) -> None:
        self.path = path
        self._config = config
        self._fresh = fresh
        self._log = MetricsLog(path / "rows.jsonl")
        self._lock: BinaryIO | None = None
        self._finished: set[str] = set()

    def __enter__(self) -> StudyFolder:
        self._lock = lock_folder(self.path)
        try:
            if self._fresh:
                self._clear()
            self._check_same()
            remove_unfinished(self.path)
        except BaseException:
            self._lock.close()
            raise
        text = json.dumps({**self._settings(), "torch": torch.__version__}, indent=2)
        write_atomic(self.path / "config.json", text.encode() + b"\n")
        self._finished = {row["run"] for row in self._log.rows() if row["kind"] == "done"}
        self._log.keep(lambda row: row["run"] in self._finished)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def done(self, job: str) -> bool:
        """Return whether a job has finished."""
        return job in self._finished

    def finish(self, job: str, rows: Iterable[Row]) -> None:
        """Write the rows of a job, and that it is done.

        Args:
            job: its name, which every row gets as "run".
            rows: JSON-serialisable; each has a "kind".
        """
        for row in rows:
            self._log.append({"kind": row["kind"], "run": job, **_rounded(row)})
        self._log.append({"kind": "done", "run": job})
        self._finished.add(job)

    def rows(self, *kinds: str) -> list[Row]:
        """Return the rows of these kinds, all if none is named, in the order jobs finished."""
        return [row for row in self._log.rows() if not kinds or row["kind"] in kinds]

    def model_path(self, job: str) -> Path:
        """Return where a job keeps its final model."""
        return self.path / "runs" / job / "final.safetensors"

    def _settings(self) -> dict[str, Any]:
        return {"study": type(self._config).__name__, **_as_json(self._config)}

    def _check_same(self) -> None:
        path = self.path / "config.json"
        if not path.exists():
            return
        try:
            stored = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {error!r}; --fresh starts over") from error
        stored = {**_as_json(type(self._config)()), **stored}  # for settings that came later
        for name, value in self._settings().items():
            if name not in self._config.grid and stored.get(name) != value:
                raise CheckpointError(
                    f"{self.path}: holds a study with {name}={stored.get(name)!r}, expected "
                    f"{value!r}; choose another --out, or --fresh to start over"
                )

    def _clear(self) -> None:
        if not (self.path / "config.json").exists():
            return  # nothing of ours
        for name in ("rows.jsonl", "config.json"):
            (self.path / name).unlink(missing_ok=True)
        for folder in ("figures", "runs"):
            shutil.rmtree(self.path / folder, ignore_errors=True)


def _as_json(config: Config) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return fields


def _rounded(value: Any) -> Any:
    """Round numbers to seven digits, as many as float32 has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value
