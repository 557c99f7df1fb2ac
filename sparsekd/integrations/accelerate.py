"""Dynamic sparse training in a loop of accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from sparsekd.integrations.stepping import refuse_scaler


class SparseTraining:
    """A method of sparse training on what `accelerator.prepare` has returned.

    `accelerator.save_state` and `load_state` take the method's state along. The loop is

        with accelerator.accumulate(model):
            accelerator.backward(loss)
            if not sparse.step():
                optimizer.step()
            optimizer.zero_grad()

    Args:
        accelerator: of the loop.
        model: prepared.
        optimizer: prepared.
        method: `skd.dst.RigL` or any other method; called with the model and torch's optimizer.
        options: passed on to the method; iterations are steps of the optimizer.

    Raises:
        UnsupportedError: gradients are scaled (`mixed_precision="fp16"`).

    Example:
        >>> import sparsekd as skd  # doctest: +SKIP
        >>> sparse = SparseTraining(
        ...     accelerator, model, optimizer, skd.dst.RigL, every=100
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        optimizer: Any,
        method: Callable[..., Any],
        **options: Any,
    ) -> None:
        refuse_scaler(accelerator.scaler, "accelerate")
        self._accelerator = accelerator
        self.method = method(model, optimizer.optimizer, **options)
        accelerator.register_for_checkpointing(self.method)

    def step(self) -> bool:
        """Update the topology if it is due and gradients are complete; call it after backward.

        Returns:
            Whether this takes the place of the optimizer's step.
        """
        return self._accelerator.sync_gradients and self.method.step()
