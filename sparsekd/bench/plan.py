"""Which sessions a call of `sparsekd bench` consists of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from sparsekd.bench import gpu
from sparsekd.bench.arms import LAYER_ARMS
from sparsekd.bench.cases import (
    BASELINES,
    BATCH,
    LINEAR_LAYERS,
    MODELS,
    PASSES,
    SPARSITIES,
    LayerCase,
    ModelCase,
    conv_layers,
)
from sparsekd.bench.levels import LayerRace, StepRace, small_epoch
from sparsekd.bench.passes import pass_arms
from sparsekd.bench.peak_memory import PeakMemory
from sparsekd.bench.peaks import PeakSession
from sparsekd.bench.race import Session
from sparsekd.bench.steps import STEP_ARMS
from sparsekd.bench.waterfall import Waterfall
from sparsekd.errors import UnsupportedError

LEVELS = ("peaks", "op", "layer", "step", "epoch", "waterfall", "memory")
_HIGH = tuple(sparsity for sparsity in SPARSITIES if sparsity >= 0.8)
_FEW = (0.8, 0.9, 0.98)
_QUICK_LAYERS = (
    LayerCase("conv", 64, 64, size=32, kernel=3),
    LayerCase("conv", 256, 64, size=32),
    LayerCase("conv", 256, 256, size=8, kernel=3),
    LayerCase("linear", 2048, 1000, batch=128),
)
_QUICK_BATCH = 32
_ONCE = (
    "dense_optimized",
    "sparseprop",
    "sparsekd_contiguous",
    "sparsekd_optimized_contiguous",
)
_MAIN = ("dense_contiguous", "dense_channels_last", "sparsekd", "sparsekd_optimized")
_PASS_ARMS = ("dense_contiguous", "dense_channels_last", "sparsekd_channels_last")
_Arm = TypeVar("_Arm")


@dataclass(frozen=True)
class Plan:
    """Say what to measure; what is None is chosen by `quick`.

    Args:
        quick: minutes at a batch of 32 instead of everything at 128.
        levels: of `LEVELS`.
        networks: of `cases.MODELS`; for "step", "waterfall" and "memory".
        sparsities: of every level.
        arms: names of arms; the dense reference always runs.
        batch: images or rows.
        rounds: turns of each arm.

    Raises:
        UnsupportedError: a word is not among those above; the text lists them.

    Example:
        >>> [session.name for session in Plan(levels=("memory",)).sessions()]
        [('memory', 'resnet18 b32', 'step')]
    """

    quick: bool = True
    levels: tuple[str, ...] = LEVELS
    networks: tuple[str, ...] | None = None
    sparsities: tuple[float, ...] | None = None
    arms: tuple[str, ...] | None = None
    batch: int | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        known_arms = {*LAYER_ARMS, *STEP_ARMS, *pass_arms("fprop")}
        _check("level", self.levels, LEVELS)
        _check("network", self.networks or (), MODELS)
        _check("arm", self.arms or (), known_arms)
        for sparsity in self.sparsities or ():
            if not 0 <= sparsity < 1:
                raise UnsupportedError(f"sparsity: expected numbers in [0, 1), got {sparsity}")
        for name, value in (("batch", self.batch), ("rounds", self.rounds)):
            if value is not None and value < 1:
                raise UnsupportedError(f"{name}: expected at least 1, got {value}")

    def sessions(self) -> list[Session]:
        """List the sessions in the order of `LEVELS`."""
        return [
            session for level in LEVELS if level in self.levels for session in self._level(level)
        ]

    def _level(self, level: str) -> Iterator[Session]:
        if level == "peaks":
            yield PeakSession()
        elif level in ("op", "layer"):
            yield from self._layers(level)
        elif level == "step":
            yield from self._steps()
        elif level == "epoch":
            case = ModelCase("resnet20", (1, 28, 28), self.batch or BATCH)
            images = 1024 if self.quick else 6144
            yield StepRace(
                case,
                self._levels_of_sparsity((0.9, 0.98)),
                self._chosen(STEP_ARMS, _MAIN),
                self._turns(3),
                small_epoch(images),
            )
        elif level == "waterfall":
            for case in self._networks(("resnet18",), ("resnet18", "resnet50")):
                arms = self._chosen(STEP_ARMS, _MAIN[1:])
                yield Waterfall(case, self._levels_of_sparsity((0.9,)), arms, self._turns(3))
        else:
            for case in self._networks(("resnet18",), ("resnet18",)):
                arms = self._chosen(STEP_ARMS, _MAIN)
                yield PeakMemory(case, self._levels_of_sparsity((0.5, 0.8, 0.9)), arms)

    def _layers(self, level: str) -> Iterator[Session]:
        layers: Sequence[LayerCase] = (*conv_layers(), *LINEAR_LAYERS)
        sparsities = self._levels_of_sparsity(SPARSITIES)
        if self.quick:
            layers = [
                replace(case, batch=min(case.batch, self.batch or _QUICK_BATCH))
                for case in _QUICK_LAYERS
            ]
            sparsities = self._levels_of_sparsity(_FEW)
        elif self.batch:
            layers = [replace(case, batch=self.batch) for case in layers]
        for case in layers:
            if level == "layer":
                arms = self._chosen(LAYER_ARMS, tuple(LAYER_ARMS))
                yield LayerRace(case, sparsities, arms, self._turns(3))
            else:
                for name in PASSES:
                    usual = _PASS_ARMS if case.kind == "conv" else tuple(pass_arms(name))
                    arms = self._chosen(pass_arms(name), usual)
                    yield LayerRace(case, sparsities, arms, self._turns(5), op=name)

    def _steps(self) -> Iterator[Session]:
        for case in self._networks(("resnet18", "resnet20"), tuple(MODELS)):
            arms = tuple(STEP_ARMS)
            if self.quick:
                arms = tuple(name for name in arms if name != "dense_compiled")
            if case.name != "resnet18":  # one network shows what these do to a step
                arms = tuple(name for name in arms if name not in _ONCE)
            sparsities: tuple[float, ...] = _FEW if self.quick else SPARSITIES
            if case.name == "resnet50":
                sparsities = tuple(s for s in sparsities if s in _HIGH)
            chosen = self._chosen(STEP_ARMS, arms)
            # One sparsity at a time, as all their networks together take more memory than most
            # machines have. What is dense beyond the references need not run every time.
            for sparsity in self._levels_of_sparsity(sparsities):
                yield StepRace(case, (sparsity,), chosen, self._turns(5))
                chosen = {n: arm for n, arm in chosen.items() if arm.sparse or n in BASELINES}

    def _levels_of_sparsity(self, usual: tuple[float, ...]) -> tuple[float, ...]:
        return self.sparsities or usual

    def _turns(self, usual: int) -> int:
        return self.rounds or (3 if self.quick else usual)

    def _networks(self, quick: tuple[str, ...], full: tuple[str, ...]) -> Iterator[ModelCase]:
        for name in self.networks or (quick if self.quick else full):
            yield replace(MODELS[name], batch=self.batch or (_QUICK_BATCH if self.quick else BATCH))

    def _chosen(self, table: Mapping[str, _Arm], usual: tuple[str, ...]) -> dict[str, _Arm]:
        wanted = usual if self.arms is None else ("dense_contiguous", *self.arms)
        return {name: arm for name, arm in table.items() if name in wanted}


def on_device(plan: Plan, device: str) -> tuple[list[Session], dict[str, Any]]:
    """List what a plan measures on a device, and describe the device.

    Args:
        plan: all of it holds for the CPU, of GPUs `rounds` only.
        device: "cpu" or "cuda".

    Returns:
        The sessions, and what `describe` is to know of the device.

    Raises:
        UnsupportedError: there is no such device here.
    """
    if device == "cpu":
        return plan.sessions(), {}
    if device != "cuda" or not torch.cuda.is_available():
        raise UnsupportedError(
            f"device: expected cpu, or cuda where torch sees a CUDA device, got {device!r}"
        )
    place = torch.device(device)
    return gpu.sessions(place, plan.rounds or 5), gpu.describe(place)


def is_ours(arm: str) -> bool:
    """Say whether an arm runs kernels of sparsekd, on whatever device.

    Example:
        >>> [is_ours(arm) for arm in ("sparsekd_contiguous", "csr_bf16", "dense_bf16", "torch_bsr")]
        [True, True, False, False]
    """
    return arm.startswith("sparsekd") or (arm in gpu.ARMS and gpu.ARMS[arm].ours)


def _check(name: str, chosen: Sequence[str], known: Sequence[str] | Mapping | set[str]) -> None:
    for word in chosen:
        if word not in known:
            raise UnsupportedError(f"{name}: expected one of {', '.join(known)}; got {word!r}")
