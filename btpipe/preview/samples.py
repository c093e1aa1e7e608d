"""A few images, their views and the numbers that made them, as the training loader gives them."""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from btpipe.data import index
from btpipe.data.pipeline import augment_params, decode
from btpipe.data.pipeline.train_loader import LoaderSettings, TrainingLoader
from btpipe.data.rejects import BadInputError
from btpipe.errors import UsageError
from btpipe.events import Report
from btpipe.recipe import Recipe, count_steps

ORIGINAL_PIXELS = 640
"""The longer side of an original in a picture; larger ones are made smaller."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of the views: colours that colour-blind people tell apart (Okabe and Ito), best ones first."""
FACTORS = ("brightness", "contrast", "saturation", "hue")


@dataclasses.dataclass(frozen=True)
class SampleView:
    """A view and what was drawn for it. Crops are in pixels of the original.

    `factors` are the jitter's names and factors in the drawn order, none where it did not happen;
    hue is in turns of the colour circle. `turns` are quarter turns against the clock.
    """

    pixels: NDArray[np.uint8]
    left: int
    top: int
    width: int
    height: int
    share: float
    flip: bool
    vertical_flip: bool
    turns: int
    factors: tuple[tuple[str, float], ...]
    gray: bool
    sigma: float
    solarize: bool


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image as it was found, `original` at most `ORIGINAL_PIXELS` large, and its views."""

    path: str
    width: int
    height: int
    original: Image.Image
    views: tuple[SampleView, ...]


def color(number: int) -> str:
    """The colour of a view, 0 for the first; from the seventh on they come again."""
    return COLORS[number % len(COLORS)]


def draw_samples(recipe: Recipe, on_event: Report, *, count: int, epoch: int) -> list[Sample]:
    """The first `count` images of an epoch, seen as a run of this recipe sees them on a CPU.

    Raises:
        UsageError: `data.train` names no images, or fewer than two.
    """
    if not recipe.data.train:
        fix = "name the images: --data DIR, or data.train in the recipe"
        raise UsageError("no images are named", where="data.train", fix=fix)
    images, _ = index.build(recipe.data.train, on_event)
    count = min(count, len(images))
    step = count_steps(len(images), count, epoch)
    with TrainingLoader(
        images,
        LoaderSettings.sample(recipe, count, steps=step + 1),
        rank=0,
        world_size=1,
        start_step=step,
        device=torch.device("cpu"),
        on_event=on_event,
        rejected={},
    ) as loader:
        batch = next(iter(loader))
    pixels = [view.numpy() for view in batch.views]
    originals = [_decoded(images, int(row)) for row in batch.images]
    sizes = np.array([pixels.shape[:2] for pixels in originals])
    draws = augment_params.draw_views(
        recipe.views, seed=recipe.seed, epoch=epoch, images=batch.images, sizes=sizes
    )
    return [
        Sample(
            path=images.table["path"][int(row)].as_py(),
            width=int(sizes[i, 1]),
            height=int(sizes[i, 0]),
            original=_shown(originals[i]),
            views=tuple(
                _view(pixels[k][i], view_draws, i, sizes[i]) for k, view_draws in enumerate(draws)
            ),
        )
        for i, row in enumerate(batch.images)
    ]


def _decoded(images: index.Index, row: int) -> NDArray[np.uint8]:
    """The pixels of an image that the loader has just decoded."""
    try:
        return decode.decode(np.frombuffer(images.read_bytes(row), np.uint8))
    except BadInputError as error:
        where = images.table["path"][row].as_py()
        raise UsageError(f"changed while it was read: {error.reason}", where=where) from error


def _shown(pixels: NDArray[np.uint8]) -> Image.Image:
    picture = Image.fromarray(pixels)
    picture.thumbnail((ORIGINAL_PIXELS, ORIGINAL_PIXELS))
    return picture


def _view(
    pixels: NDArray[np.uint8], draws: augment_params.Draws, row: int, size: NDArray[np.int64]
) -> SampleView:
    """One row of the draws, in words of a person."""
    top, left = (round(float(value)) for value in draws.crop_start[row])
    bottom, right = (round(float(value)) for value in draws.crop_end[row])
    factors = [(FACTORS[number], float(draws.factors[row, number])) for number in draws.order[row]]
    return SampleView(
        pixels=pixels,
        left=left,
        top=top,
        width=right - left,
        height=bottom - top,
        share=(right - left) * (bottom - top) / float(size.prod()),
        flip=bool(draws.flip[row]),
        vertical_flip=bool(draws.vertical_flip[row]),
        turns=int(draws.turns[row]),
        factors=tuple(factors) if draws.jitter[row] else (),
        gray=bool(draws.gray[row]),
        sigma=float(draws.blur_sigma[row]),
        solarize=bool(draws.solarize[row]),
    )
