"""The dense run of a seed, and the tickets drawn from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sparsekd.data import Dataset, Source
from sparsekd.dst import Dynamics, Method
from sparsekd.dst.registry import Layers
from sparsekd.errors import UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.sparsity import (
    allocate,
    fan_in_masks,
    grasp,
    layout_masks,
    random_masks,
    snip,
    synflow,
)
from sparsekd.tickets.cycles import Superposition
from sparsekd.tickets.kd import Distillation, DistillationConfig
from sparsekd.tickets.pruning import Masks, maskable, prune, prune_further
from sparsekd.tickets.sup import SupTickets
from sparsekd.tickets.ticket import attach, make_ticket, scale_to_active_
from sparsekd.train import (
    Reporter,
    StopRequest,
    Trainer,
    Training,
    derive_seed,
    load_state,
    make_optimizer,
    save_model,
    to_channels_last,
)

Init = Literal["keep", "sparse"]


@dataclass(frozen=True)
class Pipeline:
    """A dense run and the tickets drawn from it, all with one seed and one schedule.

    Every run sees the same batches in the same order, and runs with the same start are bit-equal at
    their start. The dense run leaves its initialisation and its state after each epoch in
    ``folder/dense``; each trainer saves its own state in a folder beside it and resumes from there.

    Args:
        build: seed -> freshly initialised dense network.
        build_narrow: seed, sparsity -> dense network of the size of a sparse one, for small-dense.
        data: the data set; only its train and val are read, which may be Datasets of torch or
            DataLoaders.
        training: hyper-parameters of every run.
        seed: of initialisation, data order and augmentation.
        folder: where the runs keep their files.
        distillation: of the methods that distil.
        dynamics: of the methods that move their topology, and of random masks.
        superposition: of Sup-tickets.
        rewind_epoch: k of the methods that rewind.
        layout: of the sparse networks.
        layers: that get masks, "convolutions" or "all"; None for those of each method.
        skip: layers that stay dense, as in `maskable`.
        init: of networks that start from no dense run, and of Reinit: "keep" for the dense
            network's own, "sparse" for `scale_to_active_` of it.
        reporter: receives progress.
        stop: checked after every step.

    Example:
        >>> import tempfile
        >>> from sparsekd import data
        >>> from sparsekd.dst import METHODS
        >>> digits = data.load("digits")
        >>> build = lambda seed: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
        >>> pipeline = Pipeline(build, digits, Training(1), 0, Path(tempfile.mkdtemp()))
        >>> _ = pipeline.dense_trainer().fit()
        >>> trainer = pipeline.ticket_trainer(METHODS["kd"], pipeline.one_shot_masks(0.5), "kd")
        >>> _ = trainer.fit()
    """

    build: Callable[[int], nn.Module]
    data: Dataset
    training: Training
    seed: int
    folder: Path
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    dynamics: Dynamics = field(default_factory=Dynamics)
    superposition: Superposition = field(default_factory=Superposition)
    rewind_epoch: int = 0
    layout: Layout = field(default_factory=Layout)
    layers: Layers | None = None
    skip: tuple[str, ...] = ()
    init: Init = "keep"
    build_narrow: Callable[[int, float], nn.Module] | None = None
    reporter: Reporter | None = None
    stop: StopRequest | None = None

    def fresh(self, purpose: str = "init") -> nn.Module:
        """Build the dense network with the initialisation of a purpose.

        Args:
            purpose: "init" is the dense run's own; any other name gives an independent draw.

        Returns:
            The dense network.
        """
        return self.build(derive_seed(self.seed, purpose))

    def checkpoint(self, epoch: int) -> Path:
        """Return the path of the dense run's state after `epoch` epochs, 0 for the start."""
        return self.folder / "dense" / f"epoch_{epoch:03}.safetensors"

    def dense_state(self, epoch: int) -> dict[str, Tensor]:
        """Load the dense run's state after `epoch` epochs.

        Raises:
            CheckpointError: the dense run has not got that far, or the file is damaged.
        """
        return load_state(self.checkpoint(epoch))

    def dense_final(self) -> nn.Module:
        """Load the dense run's final network, which is pruned and serves as the teacher."""
        model = self.fresh()
        model.load_state_dict(self.dense_state(self.training.epochs))
        return model

    def dense_trainer(self) -> Trainer:
        """Build the trainer of the dense run; it saves the state after every epoch."""
        model = self.fresh()
        save_model(self.checkpoint(0), model)
        trainer = self._trainer(model, "dense", self.training)
        trainer.keep = lambda epoch, model: save_model(self.checkpoint(epoch), model)
        return trainer

    def one_shot_masks(self, sparsity: float, **options: Any) -> Masks:
        """Prune the dense run's final network once; options are those of `prune`."""
        options = {"layers": self.layers or "convolutions", "skip": self.skip, **options}
        return prune(self.dense_final(), sparsity, layout=self.layout, **options)

    def masks(self, method: Method, sparsity: float) -> Masks:
        """Return the masks at which a method starts; they cover the layers that it masks.

        Args:
            method: says where they come from; apart from pruning, they depend on the seed alone.
            sparsity: fraction of zeros, of methods that start with their final number of weights.

        Returns:
            Module name -> bool mask; empty for a network that stays dense.

        Raises:
            UnsupportedError: the method's masks do not have the layout, or it cannot keep it.
        """
        check_layout(method, self.layout)
        match method.start:
            case "pruned":
                return self.one_shot_masks(
                    sparsity, allow_collapse=True, layers=self.layers or method.layers
                )
            case "none":
                return {}
            case "snip" | "grasp" | "synflow":
                return self._scored_masks(method, sparsity)
        masked = masked_layers(method, self.fresh(), self.layers, self.skip)
        shapes = {name: cast(Tensor, module.weight).shape for name, module in masked.items()}
        begin = method.start_sparsity(sparsity)
        distribution, seed = self.dynamics.distribution, derive_seed(self.seed, "masks")
        if not self.layout.unstructured:
            return layout_masks(shapes, begin, distribution, self.layout, seed=seed)
        nnz = allocate(shapes, begin, distribution)
        draw = fan_in_masks if method.start == "fan-in" else random_masks
        return draw(shapes, nnz, seed=seed)

    def _scored_masks(self, method: Method, sparsity: float) -> Masks:
        model = self.fresh()
        order = torch.Generator().manual_seed(derive_seed(self.seed, "masks"))
        batches = self.data.train.batches(self.training.batch_size, shuffle=True, generator=order)
        score: dict[str, Callable[..., Masks]] = {"snip": snip, "grasp": grasp, "synflow": synflow}
        masked = masked_layers(method, model, self.layers, self.skip)
        dense = maskable(model, "all").keys() - masked.keys()
        return score[method.start](model, next(iter(batches)), sparsity, skip=sorted(dense))

    def next_masks(
        self, previous: Path | None, rate: float, layers: Layers = "convolutions", **options: Any
    ) -> Masks:
        """Prune one more round of iterative magnitude pruning; see `prune_further`.

        Args:
            previous: model file of the round before, None in the first round.
            rate: fraction of the remaining weights to prune.
            layers: as in `prune_further`, unless the pipeline has its own.
            **options: of `prune_further`.

        Returns:
            The masks, each inside that of the round before.
        """
        model, layers = self.dense_final(), self.layers or layers
        options["skip"] = self.skip
        if previous is not None:
            everything = prune(model, 0.0, layers=layers, skip=self.skip)
            model = make_ticket(model, everything)
            model.load_state_dict(load_state(previous))
        return prune_further(model, rate, layers=layers, layout=self.layout, **options)

    def start(self, method: Method, masks: Masks, sparsity: float | None = None) -> nn.Module:
        """Build the ticket of a method as it is before it trains.

        Args:
            method: says where the state comes from.
            masks: module name -> bool mask.
            sparsity: of the network whose size a dense control has.

        Returns:
            The sparse network, or the control.

        Raises:
            ValueError: the method needs `build_narrow` and `sparsity`, and one was not given.
        """
        if method.start == "none":
            if self.build_narrow is None or sparsity is None:
                raise ValueError(f"build_narrow, sparsity: expected both for {method.name}")
            return self.build_narrow(derive_seed(self.seed, "init"), sparsity)
        if not method.needs_dense or method.source == "reinit":
            ticket = make_ticket(self.fresh(method.source), masks, layout=self.layout)
            return scale_to_active_(ticket) if self.init == "sparse" else ticket
        epoch = {"init": 0, "rewind": self.rewind_epoch, "final": self.training.epochs}
        state = self.dense_state(epoch[method.source])
        return make_ticket(self.fresh(), masks, state, self.layout)

    def ticket_trainer(
        self, method: Method, masks: Masks, name: str, sparsity: float | None = None
    ) -> Trainer:
        """Build the trainer of a ticket.

        Args:
            method: how the ticket starts and which loss it gets.
            masks: module name -> bool mask; fixed while it trains, unless the method moves them.
            name: subfolder of the run.
            sparsity: at the end; None for that of `masks`.

        Returns:
            The trainer; its optimizer is fresh and its schedule starts where the method says. In
            a run of Sup-tickets the schedule ends where the cycles begin.

        Raises:
            ValueError: the method starts denser than it ends, and `sparsity` is None.
        """
        if sparsity is None:
            if method.start in ("full", "half", "none"):
                raise ValueError(f"sparsity: expected a number for {method.name}, got None")
            numel = sum(mask.numel() for mask in masks.values())
            sparsity = 1 - sum(int(mask.sum()) for mask in masks.values()) / max(numel, 1)
        model = self.start(method, masks, sparsity)
        training, first = self.training, method.start_epoch(self.rewind_epoch)
        steps, superposition = len(self.data.train.batches(training.batch_size)), self.superposition
        if method.superpose and (tail := superposition.tail(training.epochs - first)):
            training = training.squeezed(tail)
            last = training.learning_rate(max(first, training.epochs - tail - 1 / steps))
            superposition = superposition.with_host(last, training.lr)
        optimizer = make_optimizer(model, training)
        dst = attach(
            method,
            model,
            optimizer,
            sparsity=sparsity,
            epochs=training.epochs - first,
            steps=steps,
            dynamics=self.dynamics,
            superposition=superposition,
            seed=derive_seed(self.seed, "growth"),
        )
        return self._trainer(
            model,
            name,
            training,
            objective=self._distillation() if method.distil else None,
            start_epoch=first,
            optimizer=optimizer,
            dst=dst,
        )

    def outcome(self, trainer: Trainer) -> nn.Module:
        """Return the result of a finished run: the superposed network, if the run has cycles.

        The BatchNorm statistics of that one are from a pass over the unaugmented training images.

        Args:
            trainer: of this pipeline, trained to the end.
        """
        if not isinstance(trainer.dst, SupTickets):
            return trainer.model
        config = self.training
        batches = self.data.train.batches(config.batch_size, channels_last=config.channels_last)
        return trainer.dst.finish(batches)

    def _distillation(self) -> Distillation:
        teacher = self.dense_final()
        if self.training.channels_last:
            teacher = to_channels_last(teacher)
        smoothing = self.training.label_smoothing
        return Distillation(teacher, label_smoothing=smoothing, **asdict(self.distillation))

    def _trainer(self, model: nn.Module, name: str, training: Training, **options: Any) -> Trainer:
        return Trainer(
            model,
            self.data.train,
            training,
            seed=derive_seed(self.seed, "train"),
            validation=_nonempty(self.data.val),
            folder=self.folder / name,
            reporter=self.reporter,
            stop=self.stop,
            **options,
        )


def masked_layers(
    method: Method, model: nn.Module, layers: Layers | None = None, skip: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Return the layers of a network that a method masks, by name.

    Args:
        method: of the run.
        model: its dense network, or one of its sparse ones.
        layers: "convolutions" or "all"; None for those of the method.
        skip: layers that stay dense, as in `maskable`.

    Raises:
        ValueError: there are none, or a pattern of `skip` matches no layer.

    Example:
        >>> from sparsekd.dst import METHODS
        >>> list(masked_layers(METHODS["rigl"], nn.Sequential(nn.Linear(2, 2))))
        ['0']
    """
    layers = layers or method.layers
    found = maskable(model, layers, skip)
    if not found and method.start != "none":
        hint = "; --set layers=all masks linear layers too" if layers == "convolutions" else ""
        raise ValueError(f"layers: {method.name} masks {layers}, the network has none{hint}")
    return found


def check_layout(method: Method, layout: Layout) -> None:
    """Check that a method can start and keep a layout.

    Args:
        method: of the run.
        layout: of its sparse network.

    Raises:
        UnsupportedError: it cannot; the message names the layouts that it supports.

    Example:
        >>> from sparsekd.dst import METHODS
        >>> check_layout(METHODS["rigl"], Layout.parse("bcsr"))
    """
    known = (layout.name,) if method.updater is None else method.updater.layouts
    if method.start in ("snip", "grasp", "synflow"):
        known = ("csr",)
    if layout.name not in known:
        raise UnsupportedError(
            f"method {method.name!r} does not support layout {str(layout)!r}; "
            f"it supports {', '.join(known)}"
        )


def _nonempty(split: Source) -> Source | None:
    return split if len(split.batches(1)) else None
