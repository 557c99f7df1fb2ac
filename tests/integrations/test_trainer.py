"""Training by the Trainer of transformers equals the plain loop bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsekd as skd
from sparsekd.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:sparsify leaves"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of channels without a weight
]
OPTIONS = {"drop_fraction": 0.3, "every": 3, "until": 100}
STEPS, BATCH, CLIP = 10, 4, 0.5


def model_of(transformers: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return skd.sparsify(transformers.BertForSequenceClassification(config), sparsity=0.7)


def examples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (STEPS * BATCH, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def trainer(transformers: Any, folder: Path, steps: int = STEPS) -> tuple[Any, Any]:
    from sparsekd.integrations.transformers import SparseTraining

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = model_of(transformers)
    optimizer = sgd(model)
    args = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True,
        save_steps=5, report_to=[], disable_tqdm=True, max_grad_norm=CLIP, logging_steps=1000,
    )  # fmt: skip
    callback = SparseTraining(skd.dst.RigL, **OPTIONS)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    made = InOrder(
        model, args, train_dataset=examples(), optimizers=(optimizer, constant),
        callbacks=[callback],
    )  # fmt: skip
    return made, callback


def plain(transformers: Any) -> Any:
    model = model_of(transformers).train()
    optimizer = sgd(model)
    method = skd.dst.RigL(model, optimizer, **OPTIONS)
    rows = examples()
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        ids = torch.stack([row["input_ids"] for row in batch])
        labels = torch.tensor([row["labels"] for row in batch])
        model(input_ids=ids, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not method.step():
            optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(model: nn.Module, expected: nn.Module, start: nn.Module) -> None:
    found, state, before = model.state_dict(), expected.state_dict(), start.state_dict()
    assert found.keys() == state.keys()
    different = [key for key in state if not torch.equal(found[key], state[key])]
    assert not different
    assert any(not torch.equal(state[k], before[k]) for k in state if k.endswith("col_indices"))


def test_train_equals_the_plain_loop_and_goes_on_from_a_checkpoint(
    transformers: Any, accelerate: Any, tmp_path: Path
) -> None:
    expected, start = plain(transformers), model_of(transformers)
    whole, callback = trainer(transformers, tmp_path / "whole")
    whole.train()
    assert callback.method.iteration == STEPS
    assert_same(whole.model, expected, start)
    resumed, callback = trainer(transformers, tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5"))
    assert callback.method.iteration == STEPS
    assert_same(resumed.model, expected, start)
    (tmp_path / "whole/checkpoint-5/sparsekd.pt").unlink()
    with pytest.raises(CheckpointError, match=r"sparsekd\.pt"):
        trainer(transformers, tmp_path / "whole")[0].train(
            resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5")
        )
