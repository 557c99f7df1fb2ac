"""Checkpoints and rows: complete or absent, and never silently damaged."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from sparsekd.errors import CheckpointError
from sparsekd.train import (
    MetricsLog,
    load_state,
    load_training,
    save_model,
    save_training,
    state_hash,
    write_atomic,
)


def test_writing_replaces_the_file_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_sparse_model_survives_the_round_trip(build, tmp_path):
    model = build().to(memory_format=torch.channels_last)
    save_model(tmp_path / "m.safetensors", model)
    state = load_state(tmp_path / "m.safetensors")
    assert state_hash(state) == state_hash(model.state_dict())
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert state_hash(other.state_dict()) == state_hash(model.state_dict())


def test_training_state_survives_the_round_trip(tmp_path):
    state = {"epoch": 3, "rows": [{"loss": 0.5}], "tensor": torch.randn(3), "none": None}
    save_training(tmp_path / "t", state)
    loaded = load_training(tmp_path / "t")
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert loaded == state


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    return {
        "empty": b"",
        "cut": content[:-10],
        "start cut": content[10:],
        "flipped bit": content[:middle] + flipped + content[middle + 1 :],
        "flipped last": content[:-1] + bytes([content[-1] ^ 1]),
        "zeros": bytes(len(content)),
    }


@pytest.mark.parametrize("damage", list(damaged(b"0" * 100)))
def test_damage_to_a_training_state_is_an_error(tmp_path, damage):
    path = tmp_path / "training.pt"
    save_training(path, {"weights": torch.randn(100)})
    path.write_bytes(damaged(path.read_bytes())[damage])
    with pytest.raises(CheckpointError, match=r"training\.pt"):
        load_training(path)


@pytest.mark.parametrize("damage", list(damaged(b"0" * 100)))
def test_damage_to_a_model_is_an_error(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_model(path, nn.Linear(20, 20))
    path.write_bytes(damaged(path.read_bytes())[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_state(path)


def test_missing_files_are_an_error(tmp_path):
    with pytest.raises(CheckpointError):
        load_training(tmp_path / "none")
    with pytest.raises(CheckpointError):
        load_state(tmp_path / "none")


def test_the_hash_sees_every_difference_that_matters():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = {"b": torch.ones(1), "a": torch.zeros(3, 2).t()}
    assert state_hash(state) == state_hash(same)
    for other in (
        state | {"a": torch.zeros(3, 2)},
        state | {"a": torch.zeros(2, 3, dtype=torch.int32)},
        state | {"a": -torch.zeros(2, 3)},
        {"c": state["a"], "b": state["b"]},
    ):
        assert state_hash(other) != state_hash(state)


def test_rows_are_appended_and_a_cut_line_does_not_count(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.rows() == []
    log.append({"run": "a", "loss": 0.1})
    log.append({"run": "b", "loss": 0.2})
    with open(log.path, "ab") as file:
        file.write(b'{"run": "c", "lo')
    assert [row["run"] for row in log.rows()] == ["a", "b"]
    log.keep(lambda row: row["run"] == "b")
    assert log.path.read_bytes() == b'{"run": "b", "loss": 0.2}\n'


def test_a_damaged_line_is_an_error(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_bytes(b'{"run": 1}\nrubbish\n{"run": 2}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        log.rows()


def test_a_row_must_be_plain_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        log.append({"loss": float("nan")})
    assert log.rows() == []
