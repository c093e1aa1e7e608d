"""A torchvision ResNet and the projector behind it; two views in, two embeddings out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models import resnet

from btpipe.pretrain.norm import ViewBatchNorm
from btpipe.recipe import Network, Recipe

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def encoder(network: Network, norm_layer: type[nn.Module] = nn.BatchNorm2d) -> resnet.ResNet:
    """The backbone with its classifier removed: (n, 3, H, W) normalised pixels -> (n, features).

    State keys are torchvision's. `zero_init_residual` as published: every block starts as identity.
    """
    build = getattr(resnet, network.backbone)
    backbone: resnet.ResNet = build(zero_init_residual=True, norm_layer=norm_layer)
    backbone.fc = nn.Identity()
    if network.stem == "small":
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone


def features(network: Network) -> int:
    """Length of the encoder's vector: 512 for resnet18 and 34, 2048 for the others."""
    return 512 if network.backbone in ("resnet18", "resnet34") else 2048


def projector(widths: Sequence[int], inputs: int) -> nn.Sequential:
    """Linear, batch norm, ReLU for each width but the last; a Linear for that. No biases.

    (n, inputs) -> (n, widths[-1]). Published: 2048-8192-8192-8192. The batch norm behind it, which
    has no parameters, is part of the loss.
    """
    layers: list[nn.Module] = []
    for width_in, width_out in zip([inputs, *widths], widths[:-1], strict=False):
        layers += [
            nn.Linear(width_in, width_out, bias=False),
            ViewBatchNorm(width_out),
            nn.ReLU(True),
        ]
    layers.append(nn.Linear([inputs, *widths][-2], widths[-1], bias=False))
    return nn.Sequential(*layers)


class Embedded(NamedTuple):
    """What the network makes of two views of n images.

    z1, z2: (n, D) embeddings, with their graph. features: (2n, F) the encoder's vectors, view
    after view, without one.
    """

    z1: torch.Tensor
    z2: torch.Tensor
    features: torch.Tensor


class BarlowTwins(nn.Module):
    """Encoder and projector, for two views at once.

    Keys of the state: `encoder.*` (torchvision's) and `projector.*`.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.encoder = encoder(network, ViewBatchNorm)
        self.projector = projector(network.projector, features(network))

    def forward(self, view1: torch.Tensor, view2: torch.Tensor) -> Embedded:
        """(n, H, W, 3) uint8 pixels of each view -> embeddings and features."""
        dtype = self.projector[-1].weight.dtype
        pixels = normalise(torch.cat([view1, view2]), dtype)  # type: ignore[arg-type]
        features = self.encoder(pixels)
        z1, z2 = self.projector(features).chunk(2)
        return Embedded(z1, z2, features.detach())


def normalise(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) normalised by ImageNet's statistics, channels_last."""
    mean = torch.tensor(MEAN, dtype=dtype, device=images.device) * 255
    scale = 1 / (torch.tensor(STD, dtype=dtype, device=images.device) * 255)
    return ((images.to(dtype) - mean) * scale).permute(0, 3, 1, 2)


def initialise(recipe: Recipe) -> BarlowTwins:
    """The network a run of this recipe starts from: its weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return BarlowTwins(recipe.network)
