"""The folder of an experiment: its configuration, its rows, and a lock."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from sparsekd import ops
from sparsekd.dst import METHODS
from sparsekd.errors import CheckpointError
from sparsekd.recipes.config import DataChoice, ModelChoice, Recipe
from sparsekd.recipes.overrides import merge
from sparsekd.recipes.presets import RECIPES
from sparsekd.train import MetricsLog, Row, Training, distributed, write_atomic
from sparsekd.train.sinks import Sink
from sparsekd.train.working_folder import lock_folder, remove_unfinished

# More of these may be asked for later; the runs that are there stay valid.
_GRID = ("methods", "sparsities", "seeds", "first_seed")

_DEFAULTS = Recipe("", "", DataChoice(""), ModelChoice(""), Training(epochs=1))


class RunFolder:
    """A folder with config.json, metrics.jsonl, one subfolder per run, and figures.

    Opening it again with the same recipe resumes where it stopped; methods, sparsities and seeds
    may differ from the last time, everything else may not, unless no run reads it. An earlier
    version's folder goes on as it began: see `as_meant`. In a distributed run every
    rank opens it, on a file system they share; rank 0 holds the lock and writes.

    Args:
        path: the folder; created if missing.
        recipe: what to run.
        fresh: first delete what an earlier experiment left here.
        sinks: receive every row besides, on rank 0.

    Raises:
        CheckpointError: the folder holds another experiment, is damaged, or is in use.

    Example:
        >>> import tempfile
        >>> from sparsekd.recipes import get
        >>> with RunFolder(Path(tempfile.mkdtemp()), get("demo")) as folder:
        ...     folder.log.rows()
        []
    """

    def __init__(
        self, path: Path, recipe: Recipe, *, fresh: bool = False, sinks: Sequence[Sink] = ()
    ) -> None:
        self.path = path
        self.log = MetricsLog(path / "metrics.jsonl")
        self._recipe = recipe
        self._fresh = fresh
        self._sinks = sinks
        self._config: Mapping[str, Any] = {}
        self._lock: BinaryIO | None = None

    def __enter__(self) -> RunFolder:
        if distributed.rank() == 0:
            self._prepare()
        distributed.wait()
        self._config = _read_config(self.path)
        return self

    def _prepare(self) -> None:
        self._lock = lock_folder(self.path)
        try:
            self._open()
        except BaseException:
            self._lock.close()  # a folder that was refused must not stay locked
            raise

    def _open(self) -> None:
        if self._fresh:
            self._clear()
        config = _read_config(self.path)
        self._check_same(config)
        remove_unfinished(self.path)
        self.log.keep(lambda row: True)  # drops a line that a crash cut short
        recipe = _jsonable(_as_meant(self._recipe, config))
        if _began_earlier(config):
            del recipe["layers"]  # it goes on as one that began earlier
        config["recipe"] = recipe
        config["sessions"].append(_session())
        write_atomic(self.path / "config.json", json.dumps(config, indent=2).encode() + b"\n")
        for sink in self._sinks:
            sink.begin(self.log.rows())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def as_meant(self, recipe: Recipe) -> Recipe:
        """Return a recipe as it was when this folder began, if an earlier version began it.

        Before recipes said which layers a method masks, that was convolutions alone, and recipes
        that ship had other values in some fields. Where `recipe` asks for nothing else than
        the one that ships does now, the folder goes on with what it has recorded.
        """
        return _as_meant(recipe, self._config)

    def model_path(self, run: str) -> Path:
        """Return where a run keeps its final model."""
        return self.path / run / "final.safetensors"

    def result(self, run: str) -> Row | None:
        """Return the result row of a run, or None if it has not finished."""
        if not self.model_path(run).exists():
            return None
        rows = [r for r in self.log.rows() if r["kind"] == "result" and r["run"] == run]
        return rows[-1] if rows else None

    def sync_epochs(self, run: str, rows: list[Row]) -> None:
        """Replace the epoch rows of a run by those in its saved state."""
        known = {row.get("epoch") for row in self.log.rows() if row["run"] == run}
        self.log.keep(lambda row: row["run"] != run)
        for row in rows:
            full = {"kind": "epoch", "run": run, **row}
            _check_finite(full)
            self.log.append(full)
            if row["epoch"] not in known:
                self._tell(full)

    def append(self, row: Row) -> None:
        """Append a row, for good, and pass it on.

        Raises:
            FloatingPointError: a number is not finite: the run has diverged.
        """
        _check_finite(row)
        self.log.append(row)
        self._tell(row)

    def _tell(self, row: Row) -> None:
        if distributed.rank() == 0:
            for sink in self._sinks:
                sink.add(row)

    def _check_same(self, config: Mapping[str, Any]) -> None:
        if "recipe" not in config:
            return
        # A field that came after this folder was made had its default then.
        stored = _recorded(config)
        wanted = flatten(_jsonable(_as_meant(self._recipe, config)))
        read = {*stored["methods"], *wanted["methods"]}
        differ = [
            name
            for name in sorted(stored.keys() | wanted.keys())
            if name not in (*_GRID, "description") and stored.get(name) != wanted.get(name)
            if not name.startswith("sup.") or any(METHODS[m].superpose for m in read & set(METHODS))
        ]
        if differ:
            what = ", ".join(
                f"{name}={stored.get(name)!r}, expected {wanted.get(name)!r}" for name in differ
            )
            raise CheckpointError(
                f"{self.path}: holds an experiment with {what}; --set goes on with its values, or "
                "choose another --out, or --fresh to start over"
            )

    def _clear(self) -> None:
        if not (self.path / "config.json").exists():
            return  # nothing of ours
        for name in ("metrics.jsonl", "config.json", "epochs.csv", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (
            *map(self.path.joinpath, ("figures", "tensorboard")),
            *self.path.glob("seed*"),
        ):
            if folder.is_dir():
                shutil.rmtree(folder)


def _check_finite(row: Row) -> None:
    wrong = [n for n, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    if wrong:
        raise FloatingPointError(
            f"{row['run']}: {', '.join(wrong)} is not finite; a lower training.lr may help, with "
            "--fresh"
        )


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of an experiment from its folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    config = _read_config(folder)
    if "recipe" not in config:
        raise CheckpointError(
            f"{folder}: expected the folder of an experiment, found no config.json"
        )
    try:
        return merge(_DEFAULTS, _nested(_recorded(config)))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: damaged: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        return {"sessions": []}
    try:
        config = json.loads(path.read_bytes())
        _ = config["recipe"], config["sessions"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error!r}; --fresh starts over") from error
    return config


def _began_earlier(config: Mapping[str, Any]) -> bool:
    """Return whether a folder began before recipes said which layers a method masks."""
    return "recipe" in config and "layers" not in config["recipe"]


def _recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a folder's recipe by dotted names; missing ones as they were then."""
    before = {"layers": "convolutions"} if _began_earlier(config) else {}
    return flatten(_jsonable(_DEFAULTS)) | before | flatten(config["recipe"])


def _as_meant(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    if not _began_earlier(config):
        return recipe
    now: dict[str, Any] = {"layers": None}
    if recipe.name in RECIPES:
        now |= flatten(_jsonable(RECIPES[recipe.name].with_epochs(recipe.training.epochs)))
    recorded, wanted = _recorded(config), flatten(_jsonable(recipe))
    plain = {name for name in now.keys() - set(_GRID) if now[name] == wanted[name]}
    return merge(recipe, _nested({name: recorded[name] for name in plain & recorded.keys()}))


def _session() -> dict[str, Any]:
    try:
        own = version("sparsekd")
    except PackageNotFoundError:  # run from the source tree
        own = "source tree"
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {"started": started, "command": command, "sparsekd": own, **ops.info()}


def _jsonable(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(recipe)))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `flatten` was given."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their dotted names.

    Example:
        >>> flatten({"a": {"b": 1}, "c": 2})
        {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
