"""A network and a batch that are small enough to be computed twice, to compare."""

import torch

from btpipe.recipe import Data, Loss, Network, Recipe, Run

BATCH, SIZE, WIDTH = 8, 32, 16


def recipe(run: Run, settings: Loss | None = None, batch: int = BATCH) -> Recipe:
    """A small network's."""
    return Recipe(
        data=Data(batch_size=batch, image_size=SIZE),
        network=Network(backbone="resnet18", projector=(WIDTH, WIDTH)),
        loss=settings or Loss(),
        run=run,
    )


def views(batch: int = BATCH) -> torch.Tensor:
    """Two views of random pixels: (2, N, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch, SIZE, SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
