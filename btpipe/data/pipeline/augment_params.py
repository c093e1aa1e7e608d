"""The numbers of every augmentation, drawn as a pure function of (seed, epoch, image, view number).

Random words are raw Philox4x32-10 output, so no library's distributions decide what a seed means.
The counter of one call is (image, epoch, tag, block): `image` and `epoch` their low 32 bits, `tag`
the view number in its top byte and the image's higher bits below. A view's blocks of four words:

    0     does it happen: flip, jitter, gray, solarize
    1     blur happens, blur sigma, order of the jitter, vertical flip
    2     brightness, contrast, saturation, hue
    3     crop y, crop x, a turn happens, which turn
    4..8  crop attempts, two in each block: area, ratio, area, ratio

Colours are one affine map for each crop: pixel -> color_matrix @ pixel + mean_matrix @ mean +
color_offset, `mean` the crop's mean RGB (contrast blends with the mean grey at its place in the
order). It equals torchvision's ColorJitter but for clipping between factors, and but for the hue,
which is turned in YIQ. Without clipping the four steps commute: each keeps greys grey and maps the
mean grey as it maps a grey pixel. The order is drawn and kept all the same, for people and for a
graph that clips.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from btpipe import recipe

GRAY = np.array([0.299, 0.587, 0.114])
"""Luma of RGB (ITU-R 601), as Pillow's `convert("L")`."""
CROP_ATTEMPTS = 10
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


@dataclasses.dataclass(frozen=True)
class Draws:
    """One view of each of n images, in numbers. Crops are in pixels of the upright image, [y, x].

    `factors` (n, 4) are brightness, contrast, saturation and hue (in turns), `order` (n, 4) their
    places; both are for people, the matrices hold their effect. A sigma of 0 means no blur. `turns`
    are quarter turns against the clock, 0 to 3, after the flips.
    """

    crop_start: NDArray[np.float32]
    crop_end: NDArray[np.float32]
    flip: NDArray[np.bool_]
    vertical_flip: NDArray[np.bool_]
    turns: NDArray[np.int64]
    color_matrix: NDArray[np.float32]
    color_offset: NDArray[np.float32]
    mean_matrix: NDArray[np.float32]
    blur_sigma: NDArray[np.float32]
    solarize: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    gray: NDArray[np.bool_]
    factors: NDArray[np.float64]
    order: NDArray[np.int64]


def philox(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32 with ten rounds: counters (n, 4) and a key (2,) -> words (n, 4).

    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, x2, x3 = (np.asarray(counter[:, i], dtype=np.uint64) for i in range(4))
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        p0, p1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x2 = (p1 >> shift) ^ x1 ^ np.uint64(k0), (p0 >> shift) ^ x3 ^ np.uint64(k1)
        x1, x3 = p1 & low, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=1).astype(np.uint32)


def key_of(seed: int) -> NDArray[np.uint32]:
    """The Philox key of a seed below 2^64: its low and its high 32 bits."""
    return np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], dtype=np.uint32)


def uniforms(
    seed: int, epoch: int, view_number: int, images: NDArray[np.int64], blocks: range
) -> NDArray[np.float64]:
    """Numbers in [0, 1), 32 bits each: (n, 4 * number of blocks)."""
    counter = np.empty((len(images), len(blocks), 4), dtype=np.uint32)
    counter[..., 0] = (images & 0xFFFFFFFF)[:, None]
    counter[..., 1] = epoch & 0xFFFFFFFF
    counter[..., 2] = ((images >> 32) | view_number << 24)[:, None]
    counter[..., 3] = np.asarray(blocks, dtype=np.uint32)
    words = philox(counter.reshape(-1, 4), key_of(seed)).reshape(len(images), -1)
    return words.astype(np.float64) * 2.0**-32


def draw_views(
    views: Sequence[recipe.View],
    *,
    seed: int,
    epoch: int,
    images: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> list[Draws]:
    """Every view of each image; `sizes` are upright [height, width], (n, 2)."""
    heights, widths = sizes.T
    return [
        draw(
            view,
            seed=seed,
            epoch=epoch,
            view_number=number,
            images=images,
            widths=widths,
            heights=heights,
        )
        for number, view in enumerate(views)
    ]


def draw(
    view: recipe.View,
    *,
    seed: int,
    epoch: int,
    view_number: int,
    images: NDArray[np.int64],
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
) -> Draws:
    """One view of each image; only the crop depends on the image's size as well."""
    images = np.asarray(images, dtype=np.int64)
    u = uniforms(seed, epoch, view_number, images, range(4))
    crop_start, crop_end = _crop(
        view, u[:, 12:14], widths, heights, (seed, epoch, view_number, images)
    )
    jitter, gray = u[:, 1] < view.jitter.probability, u[:, 2] < view.gray
    spread = np.array(
        [view.jitter.brightness, view.jitter.contrast, view.jitter.saturation, view.jitter.hue]
    )
    factors = np.array([1.0, 1.0, 1.0, 0.0]) + (2 * u[:, 8:12] - 1) * spread
    factors = np.where(jitter[:, None], factors, [1.0, 1.0, 1.0, 0.0])
    order = _ORDERS[(u[:, 6] * len(_ORDERS)).astype(np.int64)]
    matrix, mean_matrix, offset = color(factors, order, gray)
    low, high = view.blur.sigma
    sigma = np.where(u[:, 4] < view.blur.probability, low + (high - low) * u[:, 5], 0.0)
    return Draws(
        crop_start=crop_start.astype(np.float32),
        crop_end=crop_end.astype(np.float32),
        flip=u[:, 0] < view.flip,
        vertical_flip=u[:, 7] < view.vertical_flip,
        turns=np.where(u[:, 14] < view.rotate90, 1 + (3 * u[:, 15]).astype(np.int64), 0),
        color_matrix=matrix.astype(np.float32),
        color_offset=offset.astype(np.float32),
        mean_matrix=mean_matrix.astype(np.float32),
        blur_sigma=sigma.astype(np.float32),
        solarize=u[:, 3] < view.solarize.probability,
        jitter=jitter,
        gray=gray,
        factors=factors,
        order=order,
    )


def _crop(
    view: recipe.View,
    position: NDArray[np.float64],
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
    draw_of: tuple[int, int, int, NDArray[np.int64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Crops as torchvision's RandomResizedCrop draws them: ten attempts, then a central one."""
    seed, epoch, view_number, images = draw_of
    width, height = widths.astype(np.float64), heights.astype(np.float64)
    crop_width, crop_height = _central(view, width, height)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    open_rows = np.arange(len(images))
    low, high = np.log(view.ratio[0]), np.log(view.ratio[1])
    for attempt in range(CROP_ATTEMPTS):
        if not len(open_rows):
            break
        if attempt % 2 == 0:
            block = 4 + attempt // 2
            u = uniforms(seed, epoch, view_number, images[open_rows], range(block, block + 1))
        share = view.scale[0] + (view.scale[1] - view.scale[0]) * u[:, 0]
        ratio = np.exp(low + (high - low) * u[:, 1])
        area = width[open_rows] * height[open_rows] * share
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width[open_rows]) & (h > 0) & (h <= height[open_rows])
        rows = open_rows[fits]
        crop_width[rows], crop_height[rows] = w[fits], h[fits]
        top[rows] = np.floor(position[rows, 0] * (height[rows] - crop_height[rows] + 1))
        left[rows] = np.floor(position[rows, 1] * (width[rows] - crop_width[rows] + 1))
        open_rows, u = open_rows[~fits], u[~fits][:, [2, 3, 0, 1]]
    start = np.stack([top, left], axis=1)
    return start, start + np.stack([crop_height, crop_width], axis=1)


def _central(
    view: recipe.View, width: NDArray[np.float64], height: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Width and height of the largest crop whose ratio is allowed."""
    low, high = view.ratio
    crop_width = np.where(width > height * high, np.rint(height * high), width)
    crop_height = np.where(width < height * low, np.rint(width / low), height)
    return np.maximum(crop_width, 1), np.maximum(crop_height, 1)


def color(
    factors: NDArray[np.float64], order: NDArray[np.int64], gray: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The four factors in their order, then grey, as one affine map of a pixel and the crop's mean.

    (n, 4), (n, 4), (n,) -> matrix (n, 3, 3), mean matrix (n, 3, 3), offset (n, 3).
    """
    count = len(factors)
    steps = np.empty((count, 4, 3, 3))
    eye, to_gray = np.eye(3), np.broadcast_to(GRAY, (3, 3))
    saturation = factors[:, _SATURATION, None, None]
    steps[:, _BRIGHTNESS] = factors[:, _BRIGHTNESS, None, None] * eye
    steps[:, _CONTRAST] = factors[:, _CONTRAST, None, None] * eye
    steps[:, _SATURATION] = saturation * eye + (1 - saturation) * to_gray
    steps[:, _HUE] = turn_hue(factors[:, _HUE])
    matrix = np.broadcast_to(eye, (count, 3, 3))
    mean_matrix = np.zeros((count, 3, 3))
    rows = np.arange(count)
    for slot in range(4):
        chosen = order[:, slot]
        step = steps[rows, chosen]
        blend = np.where(chosen == _CONTRAST, 1 - factors[:, _CONTRAST], 0.0)
        mean_gray = GRAY @ (
            matrix + mean_matrix
        )  # (n, 3): times the mean RGB is the mean grey here
        matrix = step @ matrix
        mean_matrix = step @ mean_matrix + (blend[:, None] * mean_gray)[:, None, :]
    matrix = np.where(gray[:, None, None], (GRAY @ matrix)[:, None, :], matrix)
    mean_matrix = np.where(gray[:, None, None], (GRAY @ mean_matrix)[:, None, :], mean_matrix)
    return matrix, mean_matrix, np.zeros((count, 3))


def turn_hue(turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) -> (n, 3, 3): a turn of the colours about the grey axis in YIQ, red towards green."""
    cosine, sine = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    rotation = np.zeros((len(turns), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1], rotation[:, 1, 2] = cosine, sine
    rotation[:, 2, 1], rotation[:, 2, 2] = -sine, cosine
    return np.asarray(_FROM_YIQ @ rotation @ _TO_YIQ)
