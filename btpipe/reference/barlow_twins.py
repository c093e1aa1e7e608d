"""The published formulation, to measure against and to be compared with.

Written from the paper (arXiv 2103.03230, section 2 and appendix A) and what is known of the code
that its authors released: eager, float32, contiguous NCHW, one pass for each view, the loss through
autograd over the D x D matrix, LARS one parameter at a time. It shares nothing with
`btpipe.pretrain`, so that agreement means something.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn
from torchvision.models import resnet

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Precision = Literal["fp32", "bf16", "fp16"]


class Loss(nn.Module):
    """sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2 (eq. 1 and 2): (N, D), (N, D) -> ()."""

    def __init__(self, dimension: int, lambd: float) -> None:
        super().__init__()
        self.lambd = lambd
        self.standardise = nn.BatchNorm1d(dimension, affine=False)

    def forward(self, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
        """The loss of one batch; its gradient is autograd's."""
        correlation = self.standardise(z1).T @ self.standardise(z2)
        correlation = correlation / len(z1)
        on_diagonal = (torch.diagonal(correlation) - 1).pow(2).sum()
        off_diagonal = off_diagonal_of(correlation).pow(2).sum()
        return on_diagonal + self.lambd * off_diagonal


def off_diagonal_of(square: torch.Tensor) -> torch.Tensor:
    """All elements but the diagonal's: (D, D) -> (D (D - 1),).

    Without the last element, rows of D + 1 begin with the diagonal's elements.
    """
    size = len(square)
    return square.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten()


class Network(nn.Module):
    """Encoder, projector and loss: two normalised views (N, 3, H, W) -> ()."""

    def __init__(self, backbone: str, widths: Iterable[int], lambd: float) -> None:
        super().__init__()
        self.encoder: resnet.ResNet = getattr(resnet, backbone)(zero_init_residual=True)
        width = self.encoder.fc.in_features
        self.encoder.fc = nn.Identity()
        *hidden, dimension = widths
        layers: list[nn.Module] = []
        for following in hidden:
            layers.append(nn.Linear(width, following, bias=False))
            layers.append(nn.BatchNorm1d(following))
            layers.append(nn.ReLU(inplace=True))
            width = following
        layers.append(nn.Linear(width, dimension, bias=False))
        self.projector = nn.Sequential(*layers)
        self.loss = Loss(dimension, lambd)

    def forward(self, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        """One pass for each view."""
        loss: torch.Tensor = self.loss(
            self.projector(self.encoder(view1)), self.projector(self.encoder(view2))
        )
        return loss


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (arXiv 1708.03888), one parameter after the other.

    Parameters of one dimension (biases, batch norm) have no decay and no adaptation.
    """

    def __init__(
        self, groups: list[dict[str, object]], weight_decay: float, momentum: float, eta: float
    ) -> None:
        defaults = {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients at hand."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad
                if update is None:
                    continue
                if parameter.ndim != 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    update = update.mul(_trust(parameter, update, group["eta"]))
                state = self.state[parameter]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(parameter)
                velocity = state["velocity"]
                velocity.mul_(group["momentum"]).add_(update)
                parameter.add_(velocity, alpha=-group["lr"])


def _trust(weight: torch.Tensor, update: torch.Tensor, eta: float) -> torch.Tensor:
    """eta |w| / |u|, or 1 where a norm is zero."""
    weight_norm, update_norm = torch.norm(weight), torch.norm(update)
    one = torch.ones_like(weight_norm)
    adapted = torch.where(update_norm > 0, eta * weight_norm / update_norm, one)
    return torch.where(weight_norm > 0, adapted, one)


def optimizer_for(network: nn.Module, weight_decay: float, momentum: float, eta: float) -> LARS:
    """LARS over two groups: weights, then biases and batch norm, for their two rates."""
    weights = [parameter for parameter in network.parameters() if parameter.ndim != 1]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim == 1]
    return LARS([{"params": weights}, {"params": vectors}], weight_decay, momentum, eta)


def learning_rates(
    step: int,
    *,
    epochs: int,
    warmup_epochs: int,
    steps_per_epoch: int,
    batch_size: int,
    lr: float,
    bias_lr: float,
    final_ratio: float,
) -> tuple[float, float]:
    """(rate of the weights, rate of biases and batch norm): linear warm-up, then a cosine."""
    peak = batch_size / 256
    warmup = warmup_epochs * steps_per_epoch
    if step < warmup:
        now = peak * step / warmup
    else:
        share = 0.5 * (
            1 + math.cos(math.pi * (step - warmup) / (epochs * steps_per_epoch - warmup))
        )
        now = peak * share + final_ratio * peak * (1 - share)
    return lr * now, bias_lr * now


def normalise(images: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) contiguous float32, by ImageNet's statistics."""
    pixels = images.permute(0, 3, 1, 2).float().contiguous().div_(255)
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    deviation = torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    return pixels.sub_(mean).div_(deviation)


class Trainer:
    """The eager training step; in half precision all of it under autocast, fp16 with a scaler."""

    def __init__(self, network: Network, optimizer: LARS, precision: Precision = "fp32") -> None:
        self.network, self.optimizer, self.precision = network, optimizer, precision
        device = next(network.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")

    def step(
        self, view1: torch.Tensor, view2: torch.Tensor, lr: float, bias_lr: float
    ) -> torch.Tensor:
        """One update from (N, H, W, 3) uint8 views; returns the loss, detached."""
        half = torch.float16 if self.precision == "fp16" else torch.bfloat16
        for group, rate in zip(self.optimizer.param_groups, (lr, bias_lr), strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad()
        with torch.autocast(view1.device.type, half, enabled=self.precision != "fp32"):
            loss: torch.Tensor = self.network(normalise(view1), normalise(view2))
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()
