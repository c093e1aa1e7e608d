"""Every operation of the graphs beside its reference, at given numbers: the table of docs/views.md.

`python tests/parity_table.py [FOLDER]` prints its numbers, for drawn pictures or for 24 of the
photographs in a folder.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from parity import (
    UPRIGHT,
    Case,
    Measured,
    adjusted,
    blurred,
    coloured,
    cropped,
    decoded,
    difference,
    filtered,
    flipped,
    measure,
    measure_clipping,
    measure_evaluation,
    measure_views,
    pictures,
    resized_crop,
    solarized,
    turned,
    upside_down,
    without_colour,
)
from PIL import Image, ImageOps
from torchvision.transforms import functional

from btpipe import recipe

CROP = (20, 30, 200, 280)
"""top, left, height, width"""
SMALL_CROP = (100, 100, 70, 90)
HUES = ((-0.1, 17.0, 95), (-0.05, 9.0, 60), (0.05, 9.0, 55), (0.1, 14.0, 85))
"""Turn, and the bounds of mean and largest difference; likewise below."""
BLURS = ((0.1, 0.0, 0), (0.5, 0.6, 20), (1.0, 0.7, 50), (2.0, 0.4, 47))
ORDERS = (((2, 1, 0, 3), 2.1, 10), ((0, 1, 2, 3), 4.0, 60))


def _cases() -> Iterator[Case]:
    """Every operation of a training view; name, reference, ours, theirs, bounds."""
    bicubic = "resized_crop, bicubic, antialias"
    yield Case("crop 280 x 200", bicubic, cropped(*CROP), resized_crop(*CROP), 0.25, 11, True)
    small = cropped(*SMALL_CROP), resized_crop(*SMALL_CROP)
    yield Case("crop 90 x 70, enlarged", bicubic, *small, 0.28, 75, True)
    yield Case("flip", "hflip", flipped, ImageOps.mirror, 0.0, 0)
    yield Case("vertical_flip", "vflip", upside_down, ImageOps.flip, 0.0, 0)
    for quarters in (1, 2, 3):
        angle = 90 * quarters
        turn = turned(quarters), partial(functional.rotate, angle=angle)
        yield Case(f"rotate90, {angle} degrees", "rotate", *turn, 0.0, 0)
    for factor in (0.6, 1.4):
        light = partial(functional.adjust_brightness, brightness_factor=factor)
        ours = coloured([factor, 1, 1, 0])
        yield Case(f"brightness {factor}", "adjust_brightness", ours, light, 0.5, 1)
    for factor in (0.6, 1.4):
        contrast = partial(functional.adjust_contrast, contrast_factor=factor)
        ours = coloured([1, factor, 1, 0])
        yield Case(f"contrast {factor}", "adjust_contrast", ours, contrast, 0.5, 1)
    for factor in (0.8, 1.2):
        saturation = partial(functional.adjust_saturation, saturation_factor=factor)
        ours = coloured([1, 1, factor, 0])
        yield Case(f"saturation {factor}", "adjust_saturation", ours, saturation, 0.5, 1)
    for turns, levels, largest in HUES:
        hue = partial(functional.adjust_hue, hue_factor=turns)
        ours = coloured([1, 1, 1, turns])
        yield Case(f"hue {turns}", "adjust_hue (HSV)", ours, hue, levels, largest)
    for order, levels, largest in ORDERS:
        factors = [1.3, 0.7, 1.15, 0.0]
        ours, theirs = coloured(factors, order), partial(adjusted, factors=factors, order=order)
        steps = {0: "brightness 1.3", 1: "contrast 0.7", 2: "saturation 1.15"}
        name = ", ".join(steps[number] for number in order[:-1] if number in steps)
        yield Case(name, "ColorJitter in that order", ours, theirs, levels, largest)
    gray = partial(functional.to_grayscale, num_output_channels=3)
    yield Case("gray", "to_grayscale", without_colour, gray, 0.01, 1)
    for sigma, levels, largest in BLURS:
        boxes = partial(filtered, sigma=sigma)
        yield Case(
            f"blur {sigma}", "GaussianBlur of Pillow", blurred(sigma), boxes, levels, largest
        )
    for sigma in (0.5, 1.0, 2.0):
        exact = partial(functional.gaussian_blur, kernel_size=[23, 23], sigma=[sigma, sigma])
        yield Case(f"blur {sigma}", "gaussian_blur, 23 x 23", blurred(sigma), exact, 0.03, 1)
    solarize = partial(ImageOps.solarize, threshold=128)
    yield Case("solarize", "solarize of Pillow", solarized, solarize, 0.0, 0)


CASES = tuple(_cases())
VIEWS = {
    "view A": (recipe.VIEW_A, 6.8),
    "view B": (recipe.VIEW_B, 6.8),
    "view A, hue 0": (recipe.VIEW_A.model_copy(update={"jitter": recipe.Jitter(hue=0.0)}), 1.8),
    "view A, no jitter": (
        recipe.VIEW_A.model_copy(update={"jitter": recipe.Jitter(probability=0.0)}),
        0.55,
    ),
}
"""Whole views against the published transform, and how many grey levels apart they may be."""


def rows(images: Sequence[Image.Image]) -> Iterator[tuple[str, str, Measured]]:
    """(operation, reference, measured) for every row of the table in docs/views.md."""
    for kind in ("PNG", "JPEG"):
        ours, theirs = zip(*(decoded(image, kind) for image in images), strict=True)
        yield f"decode {kind}", "Image.open", difference(ours, theirs)
    for case in CASES:
        yield case.operation, case.reference, measure(case, images)
    yield "brightness, contrast, saturation as drawn", "without rounding", measure_clipping(images)
    for name, (view, _) in VIEWS.items():
        yield name, "published transform", measure_views(view, images)
    yield "embedding's view", "Resize(256), CenterCrop(224)", measure_evaluation(images)


def _photographs(folder: Path) -> list[Image.Image]:
    files = sorted(folder.rglob("*.jpg"))
    some = [Image.open(file) for file in files[:: max(len(files) // 24, 1)]][:24]
    return [ImageOps.exif_transpose(image).convert("RGB") for image in some]


if __name__ == "__main__":
    chosen = _photographs(Path(sys.argv[1])) if sys.argv[1:] else pictures(**UPRIGHT)
    for operation, reference, measured in rows(chosen):
        print(f"| {operation} | {reference} | {measured.mean:.2f} | {measured.largest} |")
