"""Does loading images from files keep a training step waiting?

JPEGs of ImageNet's size are generated once. Then a sparse ResNet trains on them three ways, which
take turns: by the Trainer on one batch that lies in memory, by the Trainer on the folder, and by
torchvision's reference loop on the folder. All see the same network, batch size and threads, so the
first two differ by loading alone. Without a step, `read` measures how many images a second arrive.

    python -m benchmarks.loading make jpegs
    python -m benchmarks.loading step jpegs --workers 1
    torchrun --nproc-per-node=2 -m benchmarks.loading step jpegs --workers 1
    python -m benchmarks.loading read jpegs --workers 2
    python -m benchmarks.loading table
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

import sparsekd as skd
from sparsekd.bench.machine import describe
from sparsekd.data.source import Order, Source
from sparsekd.train import (
    Interrupted,
    Reporter,
    StopRequest,
    Trainer,
    Training,
    distributed,
    make_optimizer,
)

ROWS = Path("benchmarks/results/loading.jsonl")
WAYS = ("memory", "sparsekd", "torchvision")
_SIZE = (500, 375)  # about the mean of ImageNet's photographs
_SETTLE = 2  # steps: buffers and plans are made, and what workers read ahead is used up
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(folder: Path, images: int, classes: int = 100) -> None:
    """Write photographs of smooth noise with grain, whose files are as long as ImageNet's."""
    from PIL import Image, ImageChops

    draw = np.random.default_rng(0)
    noise = draw.normal(128, 11, (2 * _SIZE[1], 2 * _SIZE[0], 3)).clip(0, 255)
    grain = Image.fromarray(noise.astype(np.uint8))
    for number in range(images):
        split = "val" if number % 50 == 0 else "train"
        path = folder / split / f"{number // 50 % classes:03}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            continue
        coarse = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(_SIZE, Image.Resampling.BICUBIC)
        left, top = int(draw.integers(_SIZE[0])), int(draw.integers(_SIZE[1]))
        part = grain.crop((left, top, left + _SIZE[0], top + _SIZE[1]))
        ImageChops.add(smooth, part, offset=-128).save(path, quality=92)


def network(name: str) -> nn.Module:
    """Return the network that every way trains: 90 % sparse, from the same seed."""
    torch.manual_seed(0)
    model = skd.models.build(name, num_classes=100, stem="imagenet")
    return skd.sparsify(model, sparsity=0.9, seed=0)


class Clock(Reporter, StopRequest):
    """The times at which steps end, and the request to stop after so many of them."""

    def __init__(self, steps: int) -> None:
        StopRequest.__init__(self)
        self.left, self.times = steps, [time.perf_counter()]

    def step(self, *_: Any) -> None:
        self.times.append(time.perf_counter())
        self.left -= 1

    def check(self, note: str = "") -> None:
        if self.left <= 0:
            raise Interrupted(note)

    def asked(self) -> bool:
        return self.left <= 0

    def each(self) -> list[float]:
        """Return milliseconds of each step but the first ones."""
        pairs = zip(self.times[_SETTLE:], self.times[_SETTLE + 1 :], strict=False)
        return [1e3 * (after - before) for before, after in pairs]


class Waiting:
    """A loader that notes for how long each batch keeps the loop waiting."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.waits: list[float] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waits.append(1e3 * (time.perf_counter() - before))
            yield batch


class WaitingSource(Source):
    """A source whose batches are those of another, through `Waiting`."""

    def __init__(self, source: Source) -> None:
        self.source, self.waits = source, list[float]()

    def __len__(self) -> int:
        return len(self.source)

    def subset(self, index: Tensor) -> Source:
        return self.source.subset(index)

    def read(self, order: Order, augment: bool, channels_last: bool) -> Iterator[Any]:
        waiting = Waiting(self.source.read(order, augment, channels_last))
        self.waits = waiting.waits
        return iter(waiting)


class Repeated:
    """A batch that is there at once, again and again."""

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.times)


def by_trainer(data: Any, options: argparse.Namespace) -> list[float]:
    """Return the step times of the Trainer on what it takes for data."""
    config = Training(epochs=1, batch_size=options.batch * distributed.ranks(), lr=0.01)
    clock = Clock(options.steps + _SETTLE)
    model = network(options.network)
    with contextlib.suppress(Interrupted):
        Trainer(model, data, config, reporter=clock, stop=clock).fit()
    return clock.each()


def reference_loader(folder: Path, options: argparse.Namespace) -> DataLoader:
    """Return the loader of torchvision's references/classification/train.py."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    preset = [
        *(v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()),
        *(v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.Normalize(_MEAN, _STD)),
    ]
    dataset = ImageFolder(str(folder / "train"), v2.Compose(preset))
    several = distributed.ranks() > 1
    sampler = DistributedSampler(dataset) if several else RandomSampler(dataset)
    return DataLoader(dataset, options.batch, sampler=sampler, num_workers=options.workers)


def by_reference(loader: Iterable[Any], options: argparse.Namespace) -> list[float]:
    """Return the step times of `train_one_epoch` of the same file; the network is as fast as ours.

    That is, it is optimized and its images are in channels_last.
    """
    model = skd.optimize(network(options.network), channels_last=False)
    optimizer = make_optimizer(model, Training(epochs=1, lr=0.01))
    called = distributed.replicate(model).train()
    criterion, clock = nn.CrossEntropyLoss(), Clock(options.steps + _SETTLE)
    for image, target in loader:
        image = image.contiguous(memory_format=torch.channels_last)
        output = called(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item(), output.topk(5)[1].eq(target[:, None]).sum()  # its meters
        clock.step()
        if clock.asked():
            break
    return clock.each()


def step(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per way with the times of its steps."""
    train = skd.data.load("imagefolder", root=folder, workers=options.workers).train
    batch = options.batch * distributed.ranks()
    first = next(iter(train.batches(batch, augment=True, channels_last=True)))
    mine = tuple(part[distributed.rank() :: distributed.ranks()].clone() for part in first)
    mine = (mine[0].contiguous(memory_format=torch.channels_last), mine[1])
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    waits: dict[str, list[float]] = {way: [] for way in WAYS}
    ours, theirs = WaitingSource(train), Waiting(reference_loader(folder, options))
    for _ in range(options.rounds):
        times["memory"] += by_trainer(Repeated(mine, 10**6), options)
        times["sparsekd"] += by_trainer(ours, options)
        waits["sparsekd"] += ours.waits[_SETTLE:]
        theirs.waits.clear()
        times["torchvision"] += by_reference(theirs, options)
        waits["torchvision"] += theirs.waits[_SETTLE:]
    return [
        {"way": way, "ms": _rounded(taken), "waits_ms": _rounded(waits[way])}
        for way, taken in times.items()
    ]


def _rounded(times: list[float]) -> list[float]:
    return [round(t, 2) for t in times]


def read(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per way with the images that arrive in a second when nothing else runs."""
    train = skd.data.load("imagefolder", root=folder, workers=options.workers).train
    rates: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        ours = train.batches(options.batch, shuffle=True, augment=True, channels_last=True)
        for way, loader in (("sparsekd", ours), ("torchvision", reference_loader(folder, options))):
            clock, seen = Clock(0), 0
            for x, _ in loader:
                clock.step()
                seen += len(x)
                if clock.times[-1] - clock.times[0] > options.seconds:
                    break
            # The workers had a head start on the first batches, by as much as they hold.
            skip = 2 * options.workers + 1
            taken = clock.times[-1] - clock.times[skip]
            rates.setdefault(way, []).append((seen - skip * options.batch) / taken)
    return [{"way": way, "images_per_second": rate} for way, rate in rates.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the tables of docs/performance.md as Markdown; later rows replace earlier ones."""
    cases: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        case = row["kind"], row["ranks"], row["workers"], row["machine"]["threads"], row["batch"]
        cases.setdefault(case, {})[row["way"]] = row
    lines = [
        "| ranks | workers of each | in memory: ms a step | from files | more | of it waiting | "
        "images/s | torchvision's loop |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rates = ["", "| workers | images/s | torchvision's loader |", "|---|---|---|"]
    for (kind, ranks, workers, _, batch), ways in sorted(cases.items()):
        if kind == "read":
            ours, theirs = (statistics.median(ways[w]["images_per_second"]) for w in WAYS[1:])
            rates.append(f"| {workers} | {ours:.0f} | {theirs:.0f} |")
            continue
        memory, ours, theirs = (statistics.median(ways[way]["ms"]) for way in WAYS)
        waits, seen = ways["sparsekd"].get("waits_ms"), 1e3 * ranks * batch
        wait = f"{statistics.median(waits):.0f}" if waits else ""
        lines.append(
            f"| {ranks} | {workers} | {memory:,.0f} | {ours:,.0f} | {ours / memory - 1:+.1%} | "
            f"{wait} | {seen / ours:.1f} | {seen / theirs:.1f} |"
        )
    return "\n".join(lines + rates)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("make", "step", "read", "table"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--images", type=int, default=20_408, help="to make; a fiftieth is val")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch", type=int, default=32, help="images per rank and step")
    parser.add_argument("--workers", type=int, default=1, help="of each rank")
    parser.add_argument("--steps", type=int, default=8, help="timed of each way and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="to read in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    if options.what == "table":
        print(table([json.loads(line) for line in options.rows.open()]))
        return
    if options.folder is None:
        parser.error("expected a folder")
    if options.what == "make":
        make(options.folder, options.images)
        return
    torch.set_num_threads(options.threads)
    with distributed.process_group():
        found = {"step": step, "read": read}[options.what](options.folder, options)
        about = {
            "kind": options.what,
            "ranks": distributed.ranks(),
            "workers": options.workers,
            "batch": options.batch,
            "network": options.network,
            "machine": describe(),
        }
        if distributed.rank() == 0:
            with options.rows.open("a") as file:
                for row in found:
                    file.write(json.dumps({**about, **row}) + "\n")
                    print({name: row[name] for name in row})


if __name__ == "__main__":
    main()
