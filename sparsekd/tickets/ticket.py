"""A ticket: the sparse network that a method starts from, and what moves its topology."""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst import Dynamics, Method, Updater
from sparsekd.dst.dynamics import Periodic
from sparsekd.layouts import Layout
from sparsekd.nn import sparse_modules, sparsify, survey
from sparsekd.nn.init import active_fans
from sparsekd.sparsity import Constant
from sparsekd.tickets.cycles import Superposition
from sparsekd.tickets.sup import SupTickets


def make_ticket(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
    layout: str | Layout = "csr",
) -> nn.Module:
    """Build a sparse network from a dense one: its state, stored for the unmasked weights only.

    Args:
        model: the dense network; not changed.
        masks: module name -> bool mask; modules without a mask stay dense.
        state: dense state dict to start from (weights, BatchNorm affine and statistics), all of
            it; by default the model's own.
        layout: of the sparse modules; the masks fit it.

    Returns:
        A new network whose stored values equal the dense ones bit for bit.

    Raises:
        RuntimeError: `state` does not fit the model.
        UnsupportedError: a mask does not fit the layout.

    Source: Renda et al., Comparing Rewinding and Fine-tuning (2020), section 2; with the
        initialisation as `state` it is the lottery ticket of Frankle and Carbin (2019).

    Example:
        >>> dense = nn.Sequential(nn.Conv2d(1, 4, 3))
        >>> ticket = make_ticket(dense, {"0": dense[0].weight.detach() > 0})
    """
    ticket = copy.deepcopy(model)
    if state is not None:
        ticket.load_state_dict(dict(state), strict=True)
    found = survey(ticket)
    # That layers without a mask stay dense was asked for here.
    unmasked = [name for name, names in found.aliases.items() if not masks.keys() & set(names)]
    skip = [glob.escape(name) for name in unmasked if name]
    return sparsify(ticket, masks=dict(masks), layout=layout, skip=skip)


@torch.no_grad()
def scale_to_active_(model: nn.Module) -> nn.Module:
    """Scale each neuron's weights by sqrt(fan-in / active fan-in), in place.

    A fresh network's neurons then have the variance of pre-activation that they have dense, however
    few inputs the masks leave them, whatever law its layers were initialised by; a full mask
    changes nothing.

    Args:
        model: a freshly initialised network with sparse modules.

    Returns:
        The model.

    Source: Evci et al., Gradient Flow in Sparse Neural Networks (arXiv 2010.03533), section 3.

    Example:
        >>> import torch, sparsekd as skd
        >>> mask = torch.tensor([[True] * 4, [True] + [False] * 3])
        >>> ticket = make_ticket(nn.Sequential(nn.Linear(4, 2)), {"0": mask})
        >>> before = ticket[0].values.clone()
        >>> (scale_to_active_(ticket)[0].values / before).tolist()
        [1.0, 1.0, 1.0, 1.0, 2.0]
    """
    for _, module in sparse_modules(model):
        topology = module.topology
        active, _ = active_fans(topology)
        fan_in = topology.numel // max(topology.rows, 1)
        module.values.mul_((fan_in / active.to(torch.float64)).sqrt().to(module.values))
    return model


def attach(
    method: Method,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    epochs: int,
    steps: int,
    dynamics: Dynamics,
    superposition: Superposition,
    seed: int,
) -> Updater | SupTickets | None:
    """Build what moves a model's topology while it trains.

    Args:
        method: names the updater, and says whether it runs in the cycles of Sup-tickets.
        model: holds sparse modules.
        optimizer: holds their values.
        sparsity: of the sparse modules at the end, for methods that do not start with it.
        epochs: of the run.
        steps: of an epoch.
        dynamics: hyper-parameters of the updater.
        superposition: hyper-parameters of the cycles.
        seed: of random growth.

    Returns:
        What the trainer steps, or None if the topology stays.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> options = {"dynamics": skd.dst.Dynamics(), "superposition": Superposition(), "seed": 0}
        >>> options |= {"sparsity": 0.9, "epochs": 100, "steps": 9}
        >>> sup = attach(skd.dst.METHODS["sup-set"], layer, opt, **options)
        >>> sup.cycles.count, sup.cycles.first_phase
        (1, 828)
    """
    if method.updater is None:
        return None
    cycles = superposition.cycles(epochs, steps)
    steps_with_updates = cycles.first_phase if method.superpose else cycles.total_steps
    options = method.updater.options(dynamics, sparsity, steps_with_updates)
    host = method.updater(model, optimizer, seed=seed, **options)
    if dynamics.decay == "constant" and "drop_fraction" in options:
        fraction = Constant(dynamics.drop_fraction)
        host.schedule = Periodic(fraction, options["every"], options["until"])
    if not method.superpose:
        return host
    return SupTickets(
        model,
        optimizer,
        host,
        total_steps=cycles.total_steps,
        cycle_fraction=cycles.cycle_fraction,
        cycle_steps=cycles.cycle_steps,
        lr=cycles.lr,
        cycle_count=cycles.cycle_count,
        drop_fraction=superposition.drop_fraction,
        average=superposition.average,
        prune_each=superposition.prune_each,
    )
