"""A callback for the Trainer of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparsekd.integrations.stepping import refuse_scaler, update_instead_of_step
from sparsekd.train.checkpoint import load_training, save_training

STATE = "sparsekd.pt"
"""File with the method's state in every checkpoint of the Trainer."""


class SparseTraining(TrainerCallback):
    """Dynamic sparse training of a model with sparse layers.

    An update takes the place of the optimizer's step. The Trainer clips gradients before, which
    changes no ranking: growth sees the factor.

    Args:
        method: `skd.dst.RigL` or any other method; called with the model and the optimizer.
        resume_from: the checkpoint that is resumed, if it is not in the Trainer's `output_dir`.
        options: passed on to the method; iterations are steps of the optimizer.

    Raises:
        UnsupportedError: gradients are scaled (`fp16=True`).
        CheckpointError: at the start, if the checkpoint that is resumed has no state of the method.

    Example:
        >>> import sparsekd as skd  # doctest: +SKIP
        >>> rigl = SparseTraining(skd.dst.RigL, every=100, until=7500)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[rigl]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        method: Callable[..., Any],
        *,
        resume_from: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self._make = partial(method, **options)
        self._resume_from = resume_from
        self.method: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        model, optimizer = parts["model"], parts["optimizer"]
        refuse_scaler(getattr(optimizer, "scaler", None), "Trainer")
        # The Trainer's optimizer is a wrapper of accelerate.
        self.method = self._make(model, getattr(optimizer, "optimizer", optimizer))
        if state.global_step:
            folder = Path(self._resume_from or _folder(args, state))
            self.method.load_state_dict(load_training(folder / STATE))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        update_instead_of_step(self.method)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            save_training(_folder(args, state) / STATE, self.method.state_dict())


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
