"""Benchmarks and advice take models of other packages, with random weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsekd.bench.advise import advise
from sparsekd.bench.model import bench_model
from sparsekd.diagnose import flops
from sparsekd.nn import sparse_modules

IDS = torch.arange(32).view(4, 8)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_embd": 24, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(intermediate_size=48, vocab_size=64, **sizes))


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(
    "build, inputs, left",
    [
        (_gpt2, {"input_ids": IDS, "labels": IDS}, "transformer.wte.weight"),
        (
            _bert,
            {"input_ids": IDS, "labels": torch.tensor([0, 1, 0, 1])},
            "bert.embeddings.word_embeddings.weight",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:sparsify leaves")
def test_advice_fits_models_whose_weights_have_the_inputs_first_and_that_return_a_loss(
    build, inputs, left
):
    model = build()
    advice = advise(model, aim="flops=0.5", rounds=1, **inputs)
    assert advice.met
    assert left in advice.left
    sparse = advice.apply(model)
    stored = {name: layer.values.numel() for name, layer in sparse_modules(sparse)}
    assert stored == {layer.name: layer.nnz for layer in advice.layers if layer.layout}
    count = flops.count(sparse, kwargs=inputs)
    assert advice.measured.flops == advice.predicted.flops == count.train


@pytest.mark.usefixtures("transformers")
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:sparsify leaves")
def test_a_benchmark_takes_inputs_by_name_and_says_what_stays_dense():
    found = bench_model(_gpt2(), sparsities=(0.5, 0.8), rounds=1, input_ids=IDS, labels=IDS)
    assert not [row for row in found.rows if "failed" in row or "refused" in row]
    assert found.speedup(0.8) > 0
    assert "Stays dense: transformer.wte.weight" in str(found)
