"""Training on GPUs by CUDA graphs: recorded once, replayed by one call from the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd import _torch
from sparsekd.dst import Updater
from sparsekd.errors import UnsupportedError
from sparsekd.nn import make_capturable, sparse_modules

_MOST_SIZES = 64  # of inputs that are remembered without being recorded


class Recorder:
    """Runs work on a GPU, or records it to be replayed, always on one stream beside the current."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @staticmethod
    def possible(device: torch.device) -> bool:
        """Return whether work on a device can be recorded."""
        return device.type == "cuda"

    def run(self, device: torch.device, work: Callable[[], Any]) -> Any:
        """Run `work` after what has been queued, and before what will be."""
        self._stream = self._stream or torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record what `work` queues without running it.

        Returns:
            What `work` returns, and a function that runs what was recorded.
        """
        # Recordings never run side by side, so all of them may use the same memory.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Threads that load data may go on allocating meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
            result = work()
        return result, graph.replay

    def drop(self) -> None:
        """Forget the memory of recordings that nobody will replay."""
        self._pool = None


@dataclass
class _Recorded:
    """A recorded call: where it reads its inputs, and where it leaves results and gradients."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    results: Any
    gradients: list[tuple[nn.Parameter, Tensor]]


class Graphed:
    """Forward and backward pass of a training step as CUDA graphs; made by `graphed`."""

    def __init__(
        self,
        step: Callable[..., Any],
        model: nn.Module,
        dst: Updater | None,
        warmup: int,
        most: int,
    ) -> None:
        for name, value in (("warmup", warmup), ("most", most)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        self.model = make_capturable(model, may_move=True)
        self.step, self.dst, self.warmup, self.most = step, dst, warmup, most
        self._modules = [module for _, module in sparse_modules(model)]
        self._recorder = Recorder()
        self._ran: dict[Any, int] = {}  # by the sizes of inputs: how often since plans were made
        self._recorded: dict[Any, _Recorded] = {}
        self._indices = self._places()

    @property
    def recorded(self) -> int:
        """How many graphs there are, one for each size of inputs."""
        return len(self._recorded)

    def __call__(self, *inputs: Tensor) -> Any:
        """Leave the gradients of `step(*inputs)` in `.grad`, and return what it returns."""
        devices = {x.device if isinstance(x, Tensor) else None for x in inputs}
        if len(devices) != 1 or None in devices:
            raise ValueError("inputs: expected tensors on one device")
        device = inputs[0].device
        if not self._recorder.possible(device):
            return self._run(*inputs)
        if self.dst is not None and (self.dst.due or self.dst.collects(self.dst.iteration + 1)):
            return self._recorder.run(device, lambda: self._run(*inputs))
        self._drop_moved()
        key = tuple((x.device, x.dtype, x.shape, x.stride()) for x in inputs)
        found = self._recorded.get(key)
        if found is None and self._ran.get(key, 0) >= self.warmup and self.recorded < self.most:
            found = self._recorded[key] = self._record(inputs)
        if found is not None:
            return self._replay(found, inputs)
        self._ran[key] = self._ran.pop(key, 0) + 1
        if len(self._ran) > _MOST_SIZES:
            del self._ran[next(iter(self._ran))]
        return self._recorder.run(device, lambda: self._run(*inputs))

    def _run(self, *inputs: Tensor) -> Any:
        for parameter in self.model.parameters():
            parameter.grad = None
        return _torch.map_only(Tensor, Tensor.detach, self.step(*inputs))

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        own = [x.detach().clone() for x in inputs]
        try:
            results, replay = self._recorder.record(lambda: self._run(*own))
        except RuntimeError as error:
            first = str(error).strip().split("\n")[0]
            raise UnsupportedError(
                "step: cannot be recorded as a CUDA graph; it must not wait for the GPU or depend "
                f"on its numbers (.item(), print, if): {first}"
            ) from error
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        return _Recorded(replay, own, results, gradients)

    def _replay(self, recorded: _Recorded, inputs: tuple[Tensor, ...]) -> Any:
        for own, x in zip(recorded.inputs, inputs, strict=True):
            own.copy_(x, non_blocking=True)
        recorded.replay()
        for parameter, gradient in recorded.gradients:
            parameter.grad = gradient
        return _torch.map_only(Tensor, Tensor.clone, recorded.results)

    def _places(self) -> list[Tensor]:
        return [module.crow_indices for module in self._modules]

    def _drop_moved(self) -> None:
        """Forget recordings from before something replaced a topology: they know addresses."""
        now = self._places()
        if all(a is b for a, b in zip(now, self._indices, strict=True)):
            return
        self._indices = now
        self._recorded.clear()
        self._recorder.drop()
        # One more step makes the plans of the kernels, which recording cannot.
        self._ran = dict.fromkeys(self._ran, self.warmup - 1)


def graphed(
    step: Callable[..., Any],
    model: nn.Module,
    dst: Updater | None = None,
    *,
    warmup: int = 3,
    most: int = 4,
) -> Graphed:
    """Return `step` so that its forward and backward pass run as a CUDA graph.

    A sparse step on a GPU is mostly waiting for Python: each op is some launches of a few
    microseconds. A graph queues all of them at once. The loop stays what it was; where the topology
    changes, gradients come from an ordinary pass, and later ones go on with the new topology. On
    other devices `step` runs as it is.

    Args:
        step: takes tensors on one device, calls the model and `backward`, and returns a tensor or
            several (the loss, say). Gradients are None when it starts. It must not wait for the
            GPU or depend on its numbers in Python; its Python runs in the first calls only, so
            numbers that change come in as tensors. Optimizer, scheduler, clipping and GradScaler
            stay outside, and work as ever.
        model: whose parameters `step` computes gradients of; becomes capturable
            (`sparsekd.make_capturable`) and must not move to another device any more.
        dst: the method that updates the topology, if one does.
        warmup: ordinary calls for each size of inputs before it is recorded. All of them count:
            every call is one pass.
        most: graphs that are kept, one for each size of inputs; other sizes run as they are.

    Returns:
        A function of the same inputs. Its results are detached copies; gradients are in `.grad`.

    Raises:
        ValueError: `model` has no sparse module; `warmup` or `most` is less than 1; when called,
            inputs are not tensors on one device.
        UnsupportedError: when called, `step` cannot be recorded.

    Example:
        >>> import torch, sparsekd as skd
        >>> model = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)  # .cuda()
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> dst = skd.dst.RigL(model, opt, every=2, until=8)
        >>> def step(x, y):
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> step = graphed(step, model, dst)
        >>> for _ in range(8):
        ...     loss = step(torch.rand(16, 8), torch.randint(4, (16,)))
        ...     if not dst.step():
        ...         opt.step()
        >>> model.topology.version, step.recorded
        (2, 0)
    """
    return Graphed(step, model, dst, warmup, most)
