"""Training by Lightning's Trainer equals the plain loop bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loops import OPTIONS, assert_same, network, plain, sgd
from torch import nn
from torch.utils.data import DataLoader

import sparsekd as skd
from sparsekd.errors import UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n_steps|Checkpoint directory)"),
]


def module_class(lightning: Any, automatic: bool = True) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.automatic_optimization = automatic

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self.network)

    return Module


def loader(batches: Any) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)


def trainer(lightning: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    from sparsekd.integrations.lightning import SparseTraining

    callback = SparseTraining(skd.dst.RigL, **OPTIONS)
    options = {"max_epochs": 1, "callbacks": [callback], "logger": False, **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    made = lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **quiet, **options
    )
    return made, callback


@pytest.mark.parametrize("accumulate, clip", [(1, None), (2, None), (1, 0.05)])
def test_a_fit_equals_the_plain_loop(lightning, batches, tmp_path, accumulate, clip) -> None:
    module = module_class(lightning)()
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    made, callback = trainer(lightning, tmp_path, **options)
    made.fit(module, loader(batches))
    assert_same(module.network, plain(batches, accumulate, clip))
    assert callback.method.iteration == -(-len(batches) // accumulate)


def test_a_resumed_fit_equals_one_without_a_stop(lightning, batches, tmp_path) -> None:
    # twice the data, in two epochs, with a stop between them
    kind = module_class(lightning)
    whole = kind()
    trainer(lightning, tmp_path, max_epochs=2)[0].fit(whole, loader(batches))
    first, _ = trainer(lightning, tmp_path)
    first.fit(kind(), loader(batches))
    first.save_checkpoint(tmp_path / "half.ckpt")
    second, callback = trainer(lightning, tmp_path, max_epochs=2)
    resumed = kind()
    second.fit(resumed, loader(batches), ckpt_path=tmp_path / "half.ckpt")
    assert callback.method.iteration == 2 * len(batches)
    assert_same(resumed.network, whole.network)
    assert_same(whole.network, plain([*batches, *batches]))


def test_optimization_by_hand_is_refused(lightning, batches, tmp_path) -> None:
    module = module_class(lightning, automatic=False)()
    with pytest.raises(UnsupportedError, match="automatic optimization"):
        trainer(lightning, tmp_path)[0].fit(module, loader(batches))


def test_scaled_gradients_are_refused() -> None:
    from sparsekd.integrations.stepping import refuse_scaler

    with pytest.raises(UnsupportedError, match="bfloat16"):
        refuse_scaler(torch.amp.GradScaler("cpu"), "Lightning")


@pytest.mark.parametrize("service", ["mlflow", "wandb"])
def test_loggers_of_tracking_services_get_the_metrics(
    lightning, batches, service, tmp_path, monkeypatch
) -> None:
    """By the packages themselves, without their servers: into files, and offline."""
    pytest.importorskip(service)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "MLFLOW_ALLOW_FILE_STORE", "true"
    )  # which is deprecated, but needs no server
    from lightning.pytorch import loggers

    if service == "mlflow":
        logger = loggers.MLFlowLogger("mine", tracking_uri=f"file:{tmp_path}/mlruns")
    else:
        logger = loggers.WandbLogger(project="mine", save_dir=tmp_path, offline=True)

    class Module(module_class(lightning)):  # type: ignore[misc]
        def training_step(self, batch: Any, index: int) -> Any:
            loss = super().training_step(batch, index)
            self.log("train_loss", loss)
            return loss

    made, _ = trainer(lightning, tmp_path, logger=logger, log_every_n_steps=1)
    made.fit(Module(), loader(batches))
    last = float(made.callback_metrics["train_loss"])
    if service == "mlflow":
        history = logger.experiment.get_metric_history(logger.run_id, "train_loss")
        assert len(history) == len(batches)
        assert history[-1].value == pytest.approx(last)
    else:
        assert logger.experiment.summary["train_loss"] == pytest.approx(last)
        logger.experiment.finish()
