"""The views of a few drawn JPEGs, as training and embedding make them on a GPU and on the CPU."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from btpipe import events, runtime
from btpipe.data import index
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.eval_loader import evaluation_batches
from btpipe.data.pipeline.train_loader import LoaderSettings, TrainingLoader
from btpipe.recipe import VIEW_A, VIEW_B

if TYPE_CHECKING:
    import torch

IMAGES, SHORTER_SIDE, SIZE = 8, 160, 96
SHAPE = (IMAGES, SIZE, SIZE, 3)


def evaluation_views(gpu: int | None) -> NDArray[np.uint8]:
    """The evaluation view of each picture, made on this GPU or on the CPU: `SHAPE`.

    Raises:
        RuntimeError: a picture could not be decoded, or DALI cannot use the GPU.
    """
    drawn = _drawn()
    batches = evaluation_batches(
        drawn,
        np.arange(IMAGES),
        Geometry.for_size(SIZE),
        batch_size=IMAGES,
        threads=runtime.cores(),
        gpu=gpu,
    )
    views = list(batches)
    for rejected in (bad for batch in views for bad in batch.rejected.values()):
        raise RuntimeError(f"a drawn JPEG cannot be decoded: {rejected.reason}")
    return np.concatenate([batch.pixels for batch in views])


def training_views(device: "torch.device") -> list[NDArray[np.uint8]]:
    """Both views of each picture, `SHAPE` each; the same draws on every device.

    Raises:
        BudgetError: a picture could not be decoded.
        RuntimeError: DALI cannot use the GPU.
    """
    settings = LoaderSettings(
        seed=0,
        views=(VIEW_A, VIEW_B),
        view_sizes=(SIZE, SIZE),
        batch_size=IMAGES,
        steps=1,
        max_bad=0,
    )
    loader = TrainingLoader(
        _drawn(),
        settings,
        rank=0,
        world_size=1,
        start_step=0,
        device=device,
        on_event=events.ignore,
        rejected={},
    )
    with loader:
        batch = next(iter(loader))
        return [view.cpu().numpy() for view in batch.views]


def grey_levels(pixels: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """The mean of |pixels - expected|, in grey levels of 256; not a number for other shapes."""
    if pixels.shape != expected.shape:
        return math.nan
    return float(np.abs(pixels.astype(np.int16) - expected.astype(np.int16)).mean())


def _drawn() -> index.Index:
    return index.build(f"synthetic:{IMAGES}x{SHORTER_SIDE}")[0]
