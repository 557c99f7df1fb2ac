"""Time whole training steps, sparse against dense in its better layout; --help lists the options.

The arms are those of `sparsekd report`: forward, loss, backward and SGD with momentum, interleaved
in one process on the same threads and with the same allocator setting. The first convolution and
the last linear layer stay dense, the others share one sparsity. One JSON line per sparsity goes to
--out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import torch

import sparsekd as skd
from sparsekd.train import CrossEntropy
from sparsekd.train.timing import time_step


def main() -> None:
    """Measure the model at each sparsity and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--input", default="3,32,32", help="channels,height,width")
    parser.add_argument("--sparsity", default="0.8,0.9,0.95,0.98")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    skd.keep_memory_warm()
    shape = tuple(map(int, options.input.split(",")))
    x, y = torch.randn(options.batch, *shape), torch.randint(0, 10, (options.batch,))
    for sparsity in map(float, options.sparsity.split(",")):
        torch.manual_seed(0)
        model = skd.models.build(options.model, num_classes=10, in_channels=shape[0])
        skd.sparsify(model, sparsity=sparsity, distribution="uniform", skip=("conv1", "fc"))
        times = time_step(model, x, y, CrossEntropy(), rounds=options.rounds)
        assert times.sparse_ms is not None
        print(
            f"{options.model} {sparsity:.2f}  dense {times.dense_contiguous_ms:7.1f} / "
            f"{times.dense_channels_last_ms:7.1f} ms  sparse {times.sparse_ms:7.1f} ms  "
            f"speed-up {times.dense_ms / times.sparse_ms:.2f}",
            flush=True,
        )
        if options.out:
            row = {
                "model": options.model,
                "sparsity": sparsity,
                **dataclasses.asdict(times),
                "torch": torch.__version__,
                "machine": platform.machine(),
                "isa": skd.ops.info()["cpp"].get("isa"),
            }
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
