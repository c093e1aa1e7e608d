"""A fixed set of images in two training views each: the same in every call."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from btpipe.data.index import Index
from btpipe.data.pipeline.train_loader import LoaderSettings, TrainingLoader
from btpipe.events import Rejected, Report
from btpipe.recipe import Recipe

BATCH = 64
"""Images that are decoded together."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Index rows (n,) and two views of each, uint8 (n, H, W, 3), in the same order."""

    rows: NDArray[np.int64]
    first: torch.Tensor
    second: torch.Tensor


def read(
    index: Index,
    recipe: Recipe,
    most: int,
    device: torch.device,
    on_event: Report,
    *,
    known_bad: Mapping[int, Rejected],
) -> Pairs:
    """At most `most` images, spread at random by the recipe's seed, as the first epoch draws them.

    Of several views the first two of full size. An image that cannot be read is left out.

    Raises:
        BudgetError: none of the images can be read.
    """
    count = min(most, len(index))
    steps = -(-count // BATCH)
    with TrainingLoader(
        index,
        _two_views(recipe, count // steps, steps),
        rank=0,
        world_size=1,
        start_step=0,
        device=device,
        on_event=on_event,
        rejected=dict(known_bad),
    ) as loader:
        batches = list(loader)
    rows = np.concatenate([batch.images for batch in batches])
    # An image that stands in for an unreadable one may be in the set already.
    first_positions = np.sort(np.unique(rows, return_index=True)[1])
    first, second = (
        torch.cat([batch.views[i] for batch in batches])[first_positions] for i in range(2)
    )
    return Pairs(rows[first_positions], first, second)


def _two_views(recipe: Recipe, size: int, steps: int) -> LoaderSettings:
    """So many batches of `size` images in the recipe's first two views of full size."""
    full = recipe.data.image_size
    sized = zip(recipe.views, recipe.view_sizes, strict=True)
    views, sizes = zip(*sorted(sized, key=lambda one: one[1] != full)[:2], strict=True)
    return LoaderSettings(
        seed=recipe.seed,
        views=views,
        view_sizes=sizes,
        batch_size=size,
        steps=steps,
        threads=recipe.data.threads,
    )
