"""A torchvision ResNet and the projector behind it; views in, an embedding of each out."""

import contextlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

from btpipe.pretrain.norm import ViewBatchNorm, group, untracked
from btpipe.recipe import Network, Recipe

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
Context = contextlib.AbstractContextManager[None]


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


class ViewEmbeddings(NamedTuple):
    """What the network makes of V views of n images.

    z: (n, D) embeddings of each view, with their graph. features: (V * n, F) the encoder's vectors,
    view after view, without one.
    """

    z: tuple[torch.Tensor, ...]
    features: torch.Tensor


class BarlowTwins(nn.Module):
    """Encoder and projector, for all views of a batch at once.

    Keys of the state: `encoder.*` (torchvision's) and `projector.*`.
    """

    recomputed = 0
    """How many residual blocks, from the first on, keep no activations (see `keep`)."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.encoder = encoder(network, ViewBatchNorm)
        self.projector = projector(network.projector, features(network))
        self._norms = tuple(m for m in self.encoder.modules() if isinstance(m, ViewBatchNorm))
        self._projector_norms = tuple(m for m in self.projector if isinstance(m, ViewBatchNorm))

    def keep(self, share: float) -> None:
        """Keeps about this share of the blocks' activations; the others are computed again.

        Each stage's blocks hold half of what the stage before held for each block, and the first
        ones hold most: they are the ones that are computed again.
        """
        stages = [self._layer(i) for i in range(4)]
        held = [0.5**i for i, stage in enumerate(stages) for _ in stage]
        kept = [sum(held[k:]) / sum(held) for k in range(len(held) + 1)]
        self.recomputed = next(k for k, value in enumerate(kept) if value <= share + 1e-9)

    def forward(self, *views: torch.Tensor) -> ViewEmbeddings:
        """(n, H, W, 3) uint8 pixels of each view -> embeddings and features.

        Neighbouring views of one size pass the encoder together, the projector takes all at once.
        """
        parts = []
        for _, same in itertools.groupby(views, key=lambda view: view.shape[1:3]):
            parts.append(self._encode(list(same)))
        features = torch.cat(parts) if len(parts) > 1 else parts[0]
        group(self._projector_norms, len(views))
        z = self.projector(features).chunk(len(views))
        return ViewEmbeddings(tuple(z), features.detach())

    def _layer(self, i: int) -> nn.Sequential:
        stage: nn.Sequential = getattr(self.encoder, f"layer{i + 1}")
        return stage

    def _encode(self, views: list[torch.Tensor]) -> torch.Tensor:
        """The encoder's vectors of views of one size; of `recomputed` blocks the input is kept."""
        group(self._norms, len(views))
        dtype = self.projector[-1].weight.dtype
        pixels = normalise(torch.cat(views), dtype)  # type: ignore[arg-type]
        if not self.recomputed:
            return self.encoder(pixels)  # type: ignore[no-any-return]
        net = self.encoder
        x = net.maxpool(net.relu(net.bn1(net.conv1(pixels))))
        for i, block in enumerate(block for k in range(4) for block in self._layer(k)):
            x = _recomputing(block, x) if i < self.recomputed else block(x)
        return torch.flatten(net.avgpool(x), 1)


def _recomputing(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`block(x)`, computed again in the backward pass; running statistics count it once."""

    def contexts() -> tuple[Context, Context]:
        return contextlib.nullcontext(), untracked(block)

    out: torch.Tensor = checkpoint(
        block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return out


def normalise(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) normalised by ImageNet's statistics, channels_last."""
    mean = torch.tensor(MEAN, dtype=dtype, device=images.device) * 255
    scale = 1 / (torch.tensor(STD, dtype=dtype, device=images.device) * 255)
    return images.to(dtype).sub_(mean).mul_(scale).permute(0, 3, 1, 2)


def initialise(recipe: Recipe) -> BarlowTwins:
    """The network a run of this recipe starts from: its weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return BarlowTwins(recipe.network)
