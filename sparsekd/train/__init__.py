"""Training: the loop, its metrics, checkpoints that resume bit-equal, processes."""

from __future__ import annotations

from sparsekd.train import distributed
from sparsekd.train.checkpoint import (
    load_state,
    load_training,
    save_model,
    save_training,
    state_hash,
    write_atomic,
)
from sparsekd.train.config import Training
from sparsekd.train.evaluation import Evaluation, evaluate
from sparsekd.train.interrupt import Interrupted, StopRequest
from sparsekd.train.loop import Trainer, derive_seed, make_optimizer, to_channels_last
from sparsekd.train.metrics import MetricsLog, Row
from sparsekd.train.objective import CrossEntropy
from sparsekd.train.progress import ProgressReporter, Reporter

__all__ = [
    "CrossEntropy",
    "Evaluation",
    "Interrupted",
    "MetricsLog",
    "ProgressReporter",
    "Reporter",
    "Row",
    "StopRequest",
    "Trainer",
    "Training",
    "derive_seed",
    "distributed",
    "evaluate",
    "load_state",
    "load_training",
    "make_optimizer",
    "save_model",
    "save_training",
    "state_hash",
    "to_channels_last",
    "write_atomic",
]
