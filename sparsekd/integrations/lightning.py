"""A callback for the Trainer of Lightning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sparsekd.errors import UnsupportedError
from sparsekd.integrations.stepping import refuse_scaler, update_instead_of_step


class SparseTraining(Callback):
    """Dynamic sparse training of a LightningModule with sparse layers.

    An update takes the place of the optimizer's step, after backward and before clipping, also
    where gradients are accumulated over batches. Checkpoints of Lightning hold the method's state.

    Args:
        method: `skd.dst.RigL` or any other method; called with the model and its one optimizer.
        options: passed on to the method; iterations are steps of the optimizer.

    Raises:
        UnsupportedError: the module optimizes by hand, has several optimizers, or gradients are
            scaled (`precision="16-mixed"` on a GPU).

    Example:
        >>> import sparsekd as skd  # doctest: +SKIP
        >>> rigl = SparseTraining(skd.dst.RigL, every=100, until=7500)  # doctest: +SKIP
        >>> Trainer(callbacks=[rigl]).fit(module, loader)  # doctest: +SKIP
    """

    def __init__(self, method: Callable[..., Any], **options: Any) -> None:
        self._make = partial(method, **options)
        self._state: dict[str, Any] | None = None
        self.method: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise UnsupportedError(
                "pl_module: expected automatic optimization with one optimizer; otherwise call "
                "`if not dst.step(): opt.step()` in training_step"
            )
        refuse_scaler(getattr(trainer.precision_plugin, "scaler", None), "Lightning")
        # Of a checkpoint, or of an earlier fit, whose optimizer is another one.
        state = self._state if self.method is None else self.method.state_dict()
        self.method = self._make(trainer.model, trainer.optimizers[0])
        if state is not None:
            self.method.load_state_dict(state)

    def on_before_optimizer_step(self, *_: Any) -> None:
        update_instead_of_step(self.method)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.method is None else {"method": self.method.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self.method = state_dict.get("method"), None
