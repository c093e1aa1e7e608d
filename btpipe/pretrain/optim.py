"""LARS over foreach operations, and the optimisers a recipe may name."""

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import nn

from btpipe.recipe import Optim

Group = dict[str, object]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888) as the published code has it.

    For a weight w (two or more dimensions) with gradient g and decay d:

        u = g + d w;    u <- u * eta |w| / |u|  where both norms are positive
        m <- momentum m + u;    w <- w - lr m

    Biases and batch norm (one dimension) take u = g: no decay, no adaptation.
    One operation runs over all tensors of a kind; nothing loops over parameters in Python.

    `found_inf` is torch's protocol for an update that must not happen: where this 0-d tensor is 1,
    parameters and momenta stay as they are, and the host need not know.
    """

    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        eta: float,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        super().__init__(groups, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update, which uses the gradients at hand up; parameters without one stay."""
        assert closure is None, "LARS evaluates nothing itself"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            updates = [p.grad for p in parameters]
            if group["adapt"]:
                _adapt(parameters, updates, group["weight_decay"], group["eta"])
            torch._fused_sgd_(
                parameters,
                updates,
                [self._momentum(p) for p in parameters],
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=None,
                found_inf=self.found_inf,
            )
        return None

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: torch.Tensor = state["momentum"]
        return momentum


def _adapt(
    weights: list[torch.Tensor], gradients: list[torch.Tensor], weight_decay: float, eta: float
) -> None:
    """Decays gradients and scales each to the norm eta |w|, in place: a copy would cost as much
    as all the rest."""
    torch._foreach_add_(gradients, weights, alpha=weight_decay)
    weight_norms = torch.stack(torch._foreach_norm(weights))
    update_norms = torch.stack(torch._foreach_norm(gradients))
    positive = (weight_norms > 0) & (update_norms > 0)
    trust = torch.where(positive, eta * weight_norms / update_norms, 1.0)
    torch._foreach_mul_(gradients, trust.unbind())


def build(optim: Optim, network: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser over two groups: weights, then biases and batch norm.

    The second group has no decay. Rates are set before every step (`set_rates`).
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    weights = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups: list[Group] = [
        {"params": weights, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if optim.name == "lars":
        groups = [
            {**group, "adapt": adapt} for group, adapt in zip(groups, (True, False), strict=True)
        ]
        return LARS(groups, lr=0.0, weight_decay=0.0, momentum=optim.momentum, eta=optim.eta)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    descent = torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, fused=True)
    if optim.momentum:
        # torch makes them, empty, in the first step: one that is left out would not fill them.
        for p in parameters:
            descent.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return descent


def set_rates(optimizer: torch.optim.Optimizer, lr: float, bias_lr: float) -> None:
    """Sets the rates of the two groups that `build` made."""
    for group, value in zip(optimizer.param_groups, (lr, bias_lr), strict=True):
        group["lr"] = value
