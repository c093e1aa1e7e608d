"""What the graph's operations give, beside torchvision's and Pillow's at the same numbers.

`parity_table` has the operations and the numbers.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from btpipe import recipe
from btpipe.data.pipeline import augment_params, dali_graphs, decode
from btpipe.tools import drawn_images

SIZE = 224
COUNT = 8
Pixels = NDArray[np.uint8]
Change = Callable[[augment_params.Draws], augment_params.Draws]
Reference = Callable[[Image.Image], Image.Image]
UPRIGHT = {"height": 300, "width": 400}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Differences in grey levels (0 to 255) over all pixels of all pictures."""

    mean: float
    largest: int


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation at given numbers, what it is compared with, and how far apart they may be.

    The bounds are above what drawn pictures show by a third or less; docs/views.md says what the
    differences come from.
    """

    operation: str
    reference: str
    change: Change
    theirs: Reference
    mean_levels: float
    largest_levels: int
    resized: bool = False
    """Else the picture has the view's size already."""


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coarse colours, finer ones over them and a little noise, none near black or white, as RGB."""
    rng = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3))
    for cells, weight in ((4, 60.0), (16, 30.0), (64, 10.0)):
        grid = rng.uniform(-1, 1, (cells, cells, 3))
        channels = [
            Image.fromarray(grid[..., c].astype(np.float32)).resize((width, height), 3)
            for c in range(3)
        ]
        layers += weight * np.stack([np.asarray(channel) for channel in channels], axis=2)
    gray = layers.mean(axis=2, keepdims=True)
    layers = gray + 0.6 * (layers - gray)  # about as colourful as photographs are
    noise = rng.normal(0, 2, layers.shape)
    return Image.fromarray((layers + noise + 128).clip(20, 220).astype(np.uint8))


def pictures(height: int, width: int) -> list[Image.Image]:
    """Half of them soft, half of them with hard edges and strong colours, some black and white."""
    soft = [photograph(height, width, seed) for seed in range(COUNT // 2)]
    names = list(drawn_images.FAMILIES)[: COUNT - len(soft)]
    hard = [
        drawn_images.picture(name, np.random.default_rng(number), max(height, width))
        for number, name in enumerate(names)
    ]
    return soft + [Image.fromarray(pixels[:height, :width]) for pixels in hard]


def unchanged(images: Sequence[Image.Image]) -> augment_params.Draws:
    """The draws that take the whole of each image and change nothing."""
    count = len(images)
    return augment_params.Draws(
        crop_start=np.zeros((count, 2), np.float32),
        crop_end=np.array([[image.height, image.width] for image in images], np.float32),
        flip=np.zeros(count, np.bool_),
        vertical_flip=np.zeros(count, np.bool_),
        turns=np.zeros(count, np.int64),
        color_matrix=np.tile(np.eye(3, dtype=np.float32), (count, 1, 1)),
        color_offset=np.zeros((count, 3), np.float32),
        mean_matrix=np.zeros((count, 3, 3), np.float32),
        blur_sigma=np.zeros(count, np.float32),
        solarize=np.zeros(count, np.bool_),
        jitter=np.zeros(count, np.bool_),
        gray=np.zeros(count, np.bool_),
        factors=np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)),
        order=np.tile(np.arange(4), (count, 1)),
    )


def draw(images: Sequence[Image.Image], draws: augment_params.Draws, size: int = SIZE) -> Pixels:
    """View 1 of `training_pipeline` for these draws, all images in one batch: (n, S, S, 3)."""
    view = recipe.View()  # what happens is in the draws
    pipeline = dali_graphs.training_pipeline(
        (view, view), (size, size), batch_size=len(images), threads=1, gpu=None
    )
    sizes = np.array([[image.height, image.width] for image in images])
    pipeline.feed_input("image", [np.asarray(image) for image in images])
    pipeline.feed_input("serial", np.zeros((len(images), 1), np.int64))
    for name, values in dali_graphs.training_inputs((draws, draws), sizes).items():
        pipeline.feed_input(name, values)
    pipeline.schedule_run()
    return np.array(pipeline.outputs()[0].as_array())


def difference(ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> Measured:
    gaps = [np.abs(a.astype(int) - b) for a, b in zip(ours, theirs, strict=True)]
    return Measured(float(np.mean([gap.mean() for gap in gaps])), int(max(g.max() for g in gaps)))


def measure(case: Case, images: Sequence[Image.Image]) -> Measured:
    """The case on images of any size."""
    if not case.resized:
        images = [image.resize((SIZE, SIZE), 3) for image in images]
    ours = draw(images, case.change(unchanged(images)))
    return difference(list(ours), [np.asarray(case.theirs(image)) for image in images])


def cropped(top: int, left: int, height: int, width: int) -> Change:
    def change(draws: augment_params.Draws) -> augment_params.Draws:
        start = np.full_like(draws.crop_start, (top, left))
        return dataclasses.replace(
            draws, crop_start=start, crop_end=start + np.array([height, width], np.float32)
        )

    return change


def resized_crop(top: int, left: int, height: int, width: int, size: int = SIZE) -> Reference:
    """As RandomResizedCrop does it."""
    bicubic = InterpolationMode.BICUBIC
    return lambda image: functional.resized_crop(
        image, top, left, height, width, [size, size], bicubic, antialias=True
    )


def coloured(
    factors: Sequence[float] | NDArray[np.float64],
    order: Sequence[int] | NDArray[np.int64] = (0, 1, 2, 3),
) -> Change:
    """These factors in this order for every image, or (n, 4) of each."""

    def change(draws: augment_params.Draws) -> augment_params.Draws:
        count = len(draws.flip)
        numbers = np.broadcast_to(factors, (count, 4)), np.broadcast_to(order, (count, 4))
        matrix, mean_matrix, offset = augment_params.color(*numbers, np.zeros(count, np.bool_))
        return dataclasses.replace(
            draws,
            color_matrix=matrix.astype(np.float32),
            mean_matrix=mean_matrix.astype(np.float32),
            color_offset=offset.astype(np.float32),
            jitter=np.ones(count, np.bool_),
        )

    return change


def without_colour(draws: augment_params.Draws) -> augment_params.Draws:
    count = len(draws.flip)
    gray = np.ones(count, np.bool_)
    matrix, mean_matrix, _ = augment_params.color(draws.factors, draws.order, gray)
    return dataclasses.replace(
        draws,
        color_matrix=matrix.astype(np.float32),
        mean_matrix=mean_matrix.astype(np.float32),
        gray=gray,
    )


def blurred(sigma: float) -> Change:
    return lambda draws: dataclasses.replace(
        draws, blur_sigma=np.full_like(draws.blur_sigma, sigma)
    )


def flipped(draws: augment_params.Draws) -> augment_params.Draws:
    return dataclasses.replace(draws, flip=np.ones_like(draws.flip))


def upside_down(draws: augment_params.Draws) -> augment_params.Draws:
    return dataclasses.replace(draws, vertical_flip=np.ones_like(draws.vertical_flip))


def turned(quarters: int) -> Change:
    return lambda draws: dataclasses.replace(draws, turns=np.full_like(draws.turns, quarters))


def filtered(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


def solarized(draws: augment_params.Draws) -> augment_params.Draws:
    return dataclasses.replace(draws, solarize=np.ones_like(draws.solarize))


ADJUSTMENTS = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


def adjusted(image: Image.Image, factors: Sequence[float], order: Sequence[int]) -> Image.Image:
    """As ColorJitter does it: byte images between the factors, so each one clips and rounds."""
    for number in order:
        image = ADJUSTMENTS[number](image, factors[number])
    return image


def measure_clipping(images: Sequence[Image.Image]) -> Measured:
    """Colours as view A draws them, but for hue, beside one that clips and never rounds."""
    images = [image.resize((SIZE, SIZE), 3) for image in images]
    view = recipe.View(jitter=recipe.Jitter(probability=1.0, hue=0.0))
    draws = drawn(view, images, epoch=0)
    ours = draw(images, coloured(draws.factors, draws.order)(unchanged(images)))
    theirs = []
    for row, image in enumerate(images):
        pixels = functional.to_tensor(image)
        for number in draws.order[row]:
            pixels = ADJUSTMENTS[number](pixels, draws.factors[row, number])
        theirs.append((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    return difference(list(ours), theirs)


def published_view(image: Image.Image, draws: augment_params.Draws, row: int) -> Image.Image:
    """main.py's transform by its own operations, with the numbers of one of our draws."""
    top, left = (int(value) for value in draws.crop_start[row])
    bottom, right = (int(value) for value in draws.crop_end[row])
    view = resized_crop(top, left, bottom - top, right - left)(image)
    view = ImageOps.mirror(view) if draws.flip[row] else view
    if draws.jitter[row]:
        view = adjusted(view, draws.factors[row], draws.order[row])
    if draws.gray[row]:
        view = functional.to_grayscale(view, 3)
    if draws.blur_sigma[row] > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(draws.blur_sigma[row])))
    return ImageOps.solarize(view, 128) if draws.solarize[row] else view


def drawn(view: recipe.View, images: Sequence[Image.Image], epoch: int) -> augment_params.Draws:
    """As a run draws them."""
    return augment_params.draw(
        view,
        seed=0,
        epoch=epoch,
        view_number=0,
        images=np.arange(len(images)),
        widths=np.array([image.width for image in images]),
        heights=np.array([image.height for image in images]),
    )


def measure_views(view: recipe.View, images: Sequence[Image.Image], epochs: int = 2) -> Measured:
    """Whole views, drawn as a run draws them, beside the published transform."""
    ours: list[Pixels] = []
    theirs: list[Pixels] = []
    for epoch in range(epochs):
        draws = drawn(view, images, epoch)
        ours += list(draw(images, draws))
        theirs += [np.asarray(published_view(im, draws, i)) for i, im in enumerate(images)]
    return difference(ours, theirs)


def measure_evaluation(images: Sequence[Image.Image], size: int = 224) -> Measured:
    """The view that is embedded, beside torchvision's Resize and CenterCrop."""
    geometry = dali_graphs.Geometry.for_size(size)
    sizes = np.array([[image.height, image.width] for image in images])
    pipeline = dali_graphs.evaluation_pipeline(
        geometry, batch_size=len(images), threads=1, gpu=None
    )
    pipeline.feed_input("image", [np.asarray(image) for image in images])
    pipeline.feed_input("serial", np.zeros((len(images), 1), np.int64))
    for name, values in dali_graphs.evaluation_inputs(geometry, sizes).items():
        pipeline.feed_input(name, values)
    pipeline.schedule_run()
    ours = np.array(pipeline.outputs()[0].as_array())
    preset = transforms.Compose(
        [transforms.Resize(geometry.resize), transforms.CenterCrop(geometry.size)]
    )
    return difference(list(ours), [np.asarray(preset(image)) for image in images])


def decoded(image: Image.Image, kind: str) -> tuple[Pixels, Pixels]:
    """A file of this kind, by our decoder and by Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    ours = decode.decode(np.frombuffer(file.getvalue(), np.uint8))
    return ours, np.asarray(Image.open(file).convert("RGB"))
