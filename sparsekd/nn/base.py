"""The base of all weight-sparse modules: rewiring, state_dict, the dense weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from sparsekd._torch import registered
from sparsekd.errors import TopologyError, UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.nn import copies
from sparsekd.nn.cuda_graphs import prepare_in_place
from sparsekd.nn.distributed import check_own, check_whole
from sparsekd.nn.init import kaiming_
from sparsekd.nn.state import note_shape, read_state
from sparsekd.nn.stored import INDICES, StoredWeight
from sparsekd.nn.weight import label, weight_of
from sparsekd.ops import observe
from sparsekd.topology import Topology, TopologyDelta

_Sparse = TypeVar("_Sparse", bound="SparseModule")
_Dense = TypeVar("_Dense", bound=nn.Module)


class SparseModule(StoredWeight):
    """A layer whose weight is stored as its nonzeros: `values` at the positions of `topology`.

    The buffers `crow_indices` and `col_indices` are what a checkpoint stores and what the forward
    pass reads; `topology` is the validated structure made of these very tensors.

    Average models whose topology moves with `sparsekd.optim.AveragedModel`: an average that knows
    no positions mixes different weights. Where a copy of a module was averaged so, or something
    wrote other positions into its buffers, it warns when it is used.

    Args:
        mask: where the weight's nonzeros are; bool tensor of the weight's shape.
        bias: whether there is a bias, one entry per row.
        layout: what this and every later mask has to fit.
        device: device of the parameters and buffers.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        mask: Tensor,
        *,
        bias: bool = True,
        layout: str | Layout = "csr",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        topology = Topology.from_mask(mask)
        self._layout = Layout.parse(layout)
        self._layout.check(mask)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_shape = tuple(topology.shape)
        self.values = nn.Parameter(torch.empty(topology.nnz, **kind))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(topology.rows, **kind)) if bias else None
        )
        self._set_topology(topology, self.values.device)

    @property
    def topology(self) -> Topology:
        """Positions of the nonzeros, always those of the buffers.

        Raises:
            TopologyError: if something has written indices into the buffers that are no structure.
        """
        known, crow, col = self._topology, self.crow_indices, self.col_indices
        if known.owns(crow, col) or crow.is_meta:
            return known
        overwritten = known.written and crow is known.crow_indices and col is known.col_indices
        if overwritten and known.accept_if_equal():
            return known
        # Something has replaced or overwritten the buffers.
        try:
            found = Topology(crow, col, self.weight_shape, version=known.version + 1)
        except TopologyError as error:
            hint = f". {copies.ADVICE}" if overwritten else ""
            raise TopologyError(f"{error}{hint}") from None
        topology = self._set_topology(self._known_or(found), crow.device)
        if overwritten:
            copies.moved(self)
            copies.warn_overwritten(self)
        return topology

    def dense_weight(self) -> Tensor:
        """Return the weight as a dense tensor with stored zeros.

        Shape:
            `topology.shape`, the outputs first

        Returns:
            A new tensor, differentiable with respect to `values`.

        Example:
            >>> import sparsekd as skd
            >>> skd.nn.SparseLinear(4, 2, sparsity=0.5).dense_weight().shape
            torch.Size([2, 4])
        """
        topology = self.topology
        check_whole(self, topology.nnz, "dense_weight()")
        weight = super().dense_weight()
        observe.show_gradient(weight, topology.crow_indices)
        return weight

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that expects one; differentiable with respect to `values`.

        Reading `dtype`, `device`, `shape` and the like costs nothing. Whatever computes with it
        makes the dense weight anew, and the first time a warning says so. What would write into
        it raises UnsupportedError.

        Shape:
            `dense_shape`

        Example:
            >>> import sparsekd as skd
            >>> layer = skd.nn.SparseLinear(4, 2, sparsity=0.5)
            >>> layer.weight.shape, layer.weight.dtype
            (torch.Size([2, 4]), torch.float32)
        """
        return weight_of(self)

    @torch.no_grad()
    def rewire(self, mask: Tensor) -> TopologyDelta:
        """Move the nonzeros to `mask`; survivors keep their values, grown ones start at 0.

        `values` stays the same Parameter object, also where its length changes; its gradient, if
        there is one, moves along. Optimizer state follows through `sparsekd.optim.remap_`.

        Args:
            mask: bool tensor of `topology.shape`.

        Returns:
            Where each weight was: `delta.source[slot]` is its old slot, -1 for a grown one.

        Raises:
            ShapeError: if `mask` does not have that shape.
            TopologyError: if `mask` is not bool.
            UnsupportedError: if `mask` does not fit the module's layout, or is one that a
                capturable module cannot take in place, or if FSDP shards the module; nothing has
                changed then.

        Source: Evci et al., Rigging the Lottery, section 3 (grown weights start at zero).

        Example:
            >>> import sparsekd as skd
            >>> layer = skd.nn.SparseLinear(4, 2, sparsity=0.5)
            >>> delta = layer.rewire(~layer.topology.mask())
            >>> bool(delta.grown.all()), layer.topology.version
            (True, 1)
        """
        return self.prepare_rewire(mask)()

    @torch.no_grad()
    def prepare_rewire(self, mask: Tensor) -> Callable[[], TopologyDelta]:
        """Check that the module can take `mask`, and return a function that rewires it.

        Several modules are so rewired all or none: what `rewire` raises is raised here.

        Args:
            mask: bool tensor of `topology.shape`.

        Returns:
            A function to be called once, before the module is rewired in another way; it returns
            what `rewire` does.

        Example:
            >>> import sparsekd as skd
            >>> layer = skd.nn.SparseLinear(4, 2, sparsity=0.5)
            >>> rewire = layer.prepare_rewire(~layer.topology.mask())
            >>> layer.topology.version, rewire().new.version
            (0, 1)
        """
        check_own(self, "rewire()")
        _, delta = self.topology.rewire(mask)
        self.layout.check(mask)
        in_place = prepare_in_place(self, delta)

        @torch.no_grad()
        def rewire() -> TopologyDelta:
            if in_place is None:
                self._replace(delta)
            else:
                in_place()
            return delta

        return rewire

    def _replace(self, delta: TopologyDelta) -> None:
        grad = None if self.values.grad is None else delta.carry(self.values.grad)
        self._set_values(delta.carry(self.values.detach()))
        self.values.grad = grad
        self._set_topology(delta.new, self.crow_indices.device)
        copies.moved(self)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new `values` and `bias`, as a fresh module would, for the current topology.

        The values follow torch's own law for the layer with the active fan-in of each neuron in
        place of the dense one. The bias, which is never sparse, follows torch's law unchanged.

        Args:
            generator: CPU generator; torch's global one when omitted.

        Source: Evci et al., Gradient Flow in Sparse Neural Networks, section 3.
        """
        if self.values.is_meta:
            return
        kaiming_(self.values, self.topology, generator=generator)
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.topology.cols, 1))
            noise = torch.empty(self.bias.shape, dtype=torch.float64, device="cpu")
            self.bias.copy_(noise.uniform_(-bound, bound, generator=generator))
        copies.in_step(self)

    def __getstate__(self) -> dict[str, Any]:
        # A topology whose tensors were overwritten could be neither copied nor pickled: renew it.
        _ = self.topology
        copies.check(self)
        own = ("_copies", "_made_at", "_left_at")
        state = {k: v for k, v in self.__dict__.items() if k not in own}
        return state | {"_is_copy": copies.Source(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        source = state.get("_is_copy")
        super().__setstate__(state | {"_is_copy": False})
        if isinstance(source, copies.Source):
            source.link(self)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return values, indices and bias; one by one, nn.Module takes a microsecond for each."""
        parameters, buffers, _ = registered(self)
        try:
            return (
                parameters["values"], buffers["crow_indices"], buffers["col_indices"],
                parameters["bias"],
            )  # fmt: skip
        except KeyError:  # what shards or computes a parameter puts it elsewhere
            return self.values, self.crow_indices, self.col_indices, self.bias

    def _watch(self) -> None:
        """Warn before a forward pass if the module's tensors were averaged; cheap if not."""
        if not is_compiling() and (self._is_copy or self._topology.written):
            copies.check(self, in_forward=True)

    def train(self: _Sparse, mode: bool = True) -> _Sparse:
        """Set the mode, and check here too, as the forward pass of a compiled model does not."""
        copies.check(self)
        return super().train(mode)

    def __prepare_scriptable__(self) -> SparseModule:
        # What torch.jit.script calls on every module that it is to compile.
        raise UnsupportedError(
            f"torch.jit.script: TorchScript cannot compile a {type(self).__name__}; script the "
            "dense model, torch.jit.script(skd.densify(model)), or keep it sparse with "
            "torch.jit.trace or torch.export"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SparseModule:
        known, before = self._topology, self.crow_indices
        with copies.converting(self):
            super()._apply(fn, recurse)
        crow = self.crow_indices
        # Undefined after to_empty, and the topology is to own what it describes.
        if crow is not before and not crow.is_meta and (before.is_meta or not known.written):
            self._set_topology(known, crow.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load values of any topology, or a dense `weight`; all of this module's state or none."""
        state = read_state(self, state_dict, prefix, local_metadata)
        if state.problems:
            error_msgs.extend(state.problems)
            if strict:
                missing_keys.extend(state.absent)
            return
        if state.topology is not None:
            assign = local_metadata.get("assign_to_params_buffers", False)
            where = state.rest[prefix + "values"] if assign else self.values
            if state.topology is self._topology:
                copies.in_step(self)
            else:
                check_own(self, "loading another topology", prefix[:-1])
                self._set_values(self.values.detach().new_empty(state.topology.nnz))
                copies.moved(self)
            self._set_topology(state.topology, where.device)
        super()._load_from_state_dict(
            state.rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if state.topology is not None:
            missing_keys[:] = [k for k in missing_keys if k not in {prefix + n for n in INDICES}]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        copies.check(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_shape(self, destination, prefix)

    def _fill_dense(self, dense: _Dense) -> _Dense:
        """Fill a dense module on the meta device with this module's weight, bias and mode."""
        weight = self._turned(self.dense_weight().detach())
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            bias = self.bias.detach().clone()
            dense.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UnsupportedError(
                f"weight of {label(self)}: a sparse layer stores no dense weight that could be "
                "replaced or shared. Write to `values`, load_state_dict({'weight': tensor, ...}), "
                "or keep the layer dense: sparsify(..., skip=<its name>)"
            )
        super().__setattr__(name, value)

    def _describe_topology(self) -> str:
        layout = "" if self.layout.unstructured else f", layout={str(self.layout)!r}"
        return f"density={self._topology.density:.4g}, nnz={self._topology.nnz}{layout}"


@torch.no_grad()
def copy_dense_(sparse: _Sparse, dense: Any) -> _Sparse:
    """Copy a dense module's weights at the positions of the sparse one, its bias and mode."""
    flat = sparse._turned(dense.weight.detach()).reshape(-1)
    sparse.values.copy_(flat[sparse.topology.flat_indices().to(flat.device)])
    sparse.values.requires_grad_(dense.weight.requires_grad)
    if sparse.bias is not None:
        assert dense.bias is not None
        sparse.bias.copy_(dense.bias).requires_grad_(dense.bias.requires_grad)
    return sparse.train(dense.training)


def sparse_modules(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    """Iterate over the weight-sparse modules of a model, each once, in the model's order.

    Args:
        model: any module.

    Returns:
        Iterator of (name, module).

    Example:
        >>> import sparsekd as skd
        >>> model = torch.nn.Sequential(skd.nn.SparseLinear(4, 2), torch.nn.ReLU())
        >>> [name for name, _ in sparse_modules(model)]
        ['0']
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseModule):
            yield name, module
