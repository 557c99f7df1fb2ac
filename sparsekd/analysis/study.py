"""What every study has: settings, data, a folder, a reporter, and a way to be stopped."""

from __future__ import annotations

from typing import Generic, TypeVar

from sparsekd.analysis.folder import Config, StudyFolder
from sparsekd.data import Dataset
from sparsekd.train import Reporter, StopRequest

Settings = TypeVar("Settings", bound=Config)
Data = TypeVar("Data", bound=Dataset | None)


class Study(Generic[Settings, Data]):
    """The jobs of a study, each done once.

    Args:
        config: the settings.
        data: the data set; a subset where `config.train_images` says so.
        folder: opened with the same settings.
        reporter: receives progress.
        stop: checked after every step.
    """

    def __init__(
        self,
        config: Settings,
        data: Data,
        folder: StudyFolder,
        *,
        reporter: Reporter | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.reporter, self.stop = reporter or Reporter(), stop or StopRequest()
