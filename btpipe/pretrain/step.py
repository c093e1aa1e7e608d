"""The training step: one update of the weights from one global batch."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch._functorch import config as functorch_config

from btpipe import runtime
from btpipe.pretrain import gradcache, loss, network, nonfinite, optim
from btpipe.recipe import Recipe
from btpipe.runtime import Precision


@dataclasses.dataclass(frozen=True)
class Core:
    """What an update needs and changes: the network, its optimiser, and how to compute.

    `micro_batch`: images of this rank that pass through the network together; 0: its whole batch.
    """

    recipe: Recipe
    device: torch.device
    network: network.BarlowTwins
    optimizer: torch.optim.Optimizer
    precision: Precision
    form: loss.Form
    scale: nonfinite.LossScale | None
    micro_batch: int

    @property
    def compiled(self) -> bool:
        """Whether the network runs through torch.compile."""
        return is_compiled(self.recipe, self.device)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context of a forward pass."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, half or torch.bfloat16, enabled=half is not None)


class Outcome(NamedTuple):
    """What an update leaves behind, on the device: nothing of it has been waited for."""

    terms: loss.Terms
    embedded: network.ViewEmbeddings
    flags: nonfinite.Flags


def is_compiled(recipe: Recipe, device: torch.device) -> bool:
    """What `run.compile` means on this device."""
    mode = recipe.run.compile
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def build(recipe: Recipe, device: torch.device) -> Core:
    """Network, optimiser and precision as a run of this recipe starts with; not yet compiled."""
    precision = runtime.precision(recipe.run.precision, device)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = network.initialise(recipe).to(device, dtype)
    model.to(memory_format=torch.channels_last)
    model.train()
    if not is_compiled(recipe, device):  # a compiler chooses what to recompute (see `compile`)
        model.keep(recipe.run.memory_budget)
    form = loss.choose_form(
        recipe.loss.form,
        recipe.data.batch_size,
        recipe.network.projector[-1],
        views=len(recipe.views),
        pairs=len(recipe.pairs),
    )
    scale = nonfinite.LossScale(device) if precision == "fp16" else None
    optimizer = optim.build(recipe.optim, model)
    micro = recipe.run.micro_batch // runtime.world_size()
    return Core(recipe, device, model, optimizer, precision, form, scale, micro)


def compile(core: Core) -> None:  # noqa: A001 - torch's name
    """Compiles the network in place, as one graph, so that state keys stay as they are.

    `run.memory_budget` is the compiler's then: it recomputes what costs least.
    """
    functorch_config.activation_memory_budget = core.recipe.run.memory_budget
    core.network.compile(fullgraph=True)


def update(core: Core, views: Sequence[torch.Tensor], lr: float, bias_lr: float) -> Outcome:
    """One update from this rank's share of the views, (n, H, W, 3) uint8 each.

    The true gradient of the global loss, summed over ranks and divided by `reference_world_size`:
    the same update at any number of ranks. An update that is not finite is left out, on the device.
    Nothing here waits for the device, and nothing loops over parameters in Python.
    """
    optim.set_rates(core.optimizer, lr, bias_lr)
    core.optimizer.zero_grad(set_to_none=True)
    embedded, terms = _backward(core, views)
    parameters = [p for p in core.network.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    flags = nonfinite.flags(gradients, list(embedded.z))
    runtime.sum_gradients(parameters)
    if core.scale:
        core.scale.unscale(gradients)
    core.optimizer.found_inf = flags.found_inf  # type: ignore[attr-defined]
    core.optimizer.step()
    if core.scale:
        core.scale.update(flags.found_inf)
    return Outcome(terms, embedded, flags)


def _backward(
    core: Core, views: Sequence[torch.Tensor]
) -> tuple[network.ViewEmbeddings, loss.Terms]:
    """Leaves this rank's share of the gradient in the parameters."""

    def forward(views: Sequence[torch.Tensor]) -> network.ViewEmbeddings:
        with core.autocast():
            return core.network(*views)  # type: ignore[no-any-return]

    def judge(z: Sequence[torch.Tensor]) -> tuple[loss.Terms, list[torch.Tensor]]:
        settings = core.recipe.loss
        terms, gradients = loss.value_and_gradient(z, settings.lambd, core.form, core.recipe.pairs)
        factor = settings.scale / core.recipe.optim.reference_world_size
        scale = core.scale.scale * factor if core.scale else factor
        return terms, [gradient.mul_(scale) for gradient in gradients]

    if 0 < core.micro_batch < len(views[0]):
        return gradcache.backward(core.network, forward, judge, views, core.micro_batch)
    embedded = forward(views)
    terms, gradients = judge(embedded.z)
    z_gradients = [gradient.to(z.dtype) for gradient, z in zip(gradients, embedded.z, strict=True)]
    torch.autograd.backward(embedded.z, z_gradients)
    return network.ViewEmbeddings(tuple(z.detach() for z in embedded.z), embedded.features), terms
