"""A linear head on an encoder that is frozen or tuned with it: pixels to logits."""

import torch
from safetensors.torch import load_file
from torch import nn

from btpipe.errors import IntegrityError
from btpipe.export import contract, weights
from btpipe.pretrain import network, norm


class Classifier(nn.Module):
    """Encoder and head: (n, S, S, 3) uint8 -> logits (n, classes).

    A frozen encoder stays in evaluation mode and gives no gradient; one that is tuned has batch
    norm across replicas, so that the update does not depend on their number.
    """

    def __init__(self, bundle: contract.Bundle, classes: int, *, tuned: bool, seed: int) -> None:
        super().__init__()
        layer = norm.ViewBatchNorm if tuned else nn.BatchNorm2d
        self.encoder = network.encoder(weights.described(bundle), layer)
        state = load_file(bundle.folder / contract.WEIGHTS)
        try:
            self.encoder.load_state_dict(state)
        except RuntimeError as error:
            where = bundle.folder / contract.WEIGHTS
            raise IntegrityError(
                f"not {bundle.architecture}'s weights: {error}", where=where
            ) from error
        norm.group((m for m in self.encoder.modules() if isinstance(m, norm.ViewBatchNorm)), 1)
        self.head = nn.Linear(bundle.dimension, classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.normal_(self.head.weight, std=0.01)  # as published
        nn.init.zeros_(self.head.bias)
        self.tuned = tuned
        self.encoder.requires_grad_(tuned)

    def train(self, mode: bool = True) -> "Classifier":
        """A frozen encoder stays as it is."""
        super().train(mode)
        self.encoder.train(mode and self.tuned)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of pixels."""
        pixels = network.normalise(images, torch.float32)
        with torch.set_grad_enabled(self.tuned and torch.is_grad_enabled()):
            features = self.encoder(pixels)
        logits: torch.Tensor = self.head(features.float())
        return logits
