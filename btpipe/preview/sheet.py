"""A picture of images and their views with the drawn numbers, for a person to judge."""

import dataclasses
import functools
import io
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from btpipe import artifact
from btpipe.errors import UsageError
from btpipe.events import Finished, Report
from btpipe.preview.page import write_page
from btpipe.preview.samples import Sample, SampleView, color, draw_samples
from btpipe.recipe import Recipe

CELL = 224
"""Pixels of a cell's side."""
GAP = 12
TEXT_LINES = 5
TEXT_SIZE, TITLE_SIZE = 12, 15
LINE = 15
HEAD = 58
INK, MUTED, PAPER, FRAME = "#1a1a1a", "#666666", "#ffffff", "#ececec"
ELLIPSIS = "\u2026"


@dataclasses.dataclass(frozen=True)
class ViewsDrawn(Finished):
    """A sheet of `images` images as `epoch` shows them, and its page where one was asked for."""

    job = "views"

    out: Path
    page: Path | None
    images: int
    epoch: int

    @property
    def text(self) -> str:
        paths = f"{self.out} and {self.page}" if self.page else f"{self.out}"
        return f"{paths}: {self.images} images as epoch {self.epoch} shows them"


def make(
    recipe: Recipe, name: str, out: Path, on_event: Report, *, count: int, epoch: int, page: bool
) -> None:
    """Writes the sheet of the first `count` images of an epoch, and its page beside it if asked.

    Raises:
        UsageError: `out` is no PNG, or `data.train` names no images.
        MachineError: no space, or no permission.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}", expected="a name that ends in .png")
    started = time.monotonic()
    samples = draw_samples(recipe, on_event, count=count, epoch=epoch)
    about = (
        f"seed {recipe.seed}, epoch {epoch}, {recipe.data.image_size} pixels, {recipe.data.train}"
    )
    content = io.BytesIO()
    draw(samples, f"{name}: {about}").save(content, "PNG")
    artifact.write_file(out, content.getvalue())
    page_path = out.with_suffix(".html") if page else None
    if page_path is not None:
        write_page(page_path, samples, f"Views of {name}", about, recipe.to_toml())
    on_event(ViewsDrawn(time.monotonic() - started, out, page_path, len(samples), epoch))


def draw(samples: Sequence[Sample], title: str) -> Image.Image:
    """Two images in a row from four on, where they have two views: each its original, with the
    crops in it, and its views.
    """
    cells = 1 + len(samples[0].views)
    across = 2 if len(samples) > 3 and cells == 3 else 1
    block_width = cells * CELL + (cells - 1) * GAP
    block_height = CELL + TEXT_LINES * LINE + 2 * GAP
    rows = -(-len(samples) // across)
    width = across * block_width + (across + 1) * 2 * GAP
    sheet = Image.new("RGB", (width, HEAD + rows * block_height + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * GAP, GAP), _fitted(title, width - 4 * GAP, TITLE_SIZE), INK, _font(TITLE_SIZE))
    for column in range(across):
        left = 2 * GAP + column * (block_width + 2 * GAP)
        _head(pen, left, HEAD - LINE - 4, cells - 1)
        for row in range(rows):
            number = row * across + column
            if number < len(samples):
                _sample(sheet, pen, (left, HEAD + row * block_height), samples[number])
    return sheet


def lines(view: SampleView) -> list[str]:
    """The numbers of a view as `TEXT_LINES` short lines or fewer."""
    orientation = [
        *(["flip"] if view.flip else []),
        *(["vertical flip"] if view.vertical_flip else []),
        *([f"turn {90 * view.turns}\u00b0"] if view.turns else []),
    ]
    signs = {"hue": "+"}
    factors = [f"{name} {value:{signs.get(name, '')}.2f}" for name, value in view.factors]
    end = [
        *(["gray"] if view.gray else []),
        *([f"blur {view.sigma:.2f}"] if view.sigma else []),
        *(["solarize"] if view.solarize else []),
    ]
    jitter = [", ".join(factors[:2]), ", ".join(factors[2:])] if factors else ["no jitter"]
    crop = f"{view.width} x {view.height} at {view.left}, {view.top} ({100 * view.share:.3g}%)"
    return [
        crop,
        ", ".join(orientation) or "not mirrored",
        *jitter,
        ", ".join(end) or "no gray, blur, solarize",
    ]


def _head(pen: ImageDraw.ImageDraw, left: int, top: int, views: int) -> None:
    pen.text((left, top), "original", MUTED, _font(TEXT_SIZE))
    for number in range(views):
        x = left + (number + 1) * (CELL + GAP)
        pen.rectangle((x, top + 3, x + 9, top + 12), color(number))
        pen.text((x + 15, top), f"view {number + 1}", MUTED, _font(TEXT_SIZE))


def _sample(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], sample: Sample
) -> None:
    left, top = corner
    _paste(sheet, pen, (left, top), with_crops(sample))
    caption = [_fitted(sample.path, CELL, TEXT_SIZE), f"{sample.width} x {sample.height}"]
    _write(pen, (left, top + CELL), caption)
    for number, view in enumerate(sample.views):
        x = left + (number + 1) * (CELL + GAP)
        _paste(sheet, pen, (x, top), enlarged(view))
        _write(pen, (x, top + CELL), [_fitted(line, CELL, TEXT_SIZE) for line in lines(view)])


def with_crops(sample: Sample) -> Image.Image:
    """The original as large as a cell, each view's crop framed in its colour."""
    scale = CELL / max(sample.width, sample.height)
    size = max(round(sample.width * scale), 1), max(round(sample.height * scale), 1)
    picture = sample.original.resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    for number, view in enumerate(sample.views):
        right, bottom = view.left + view.width, view.top + view.height
        box = [round(value * scale) for value in (view.left, view.top, right, bottom)]
        left, top = (min(box[i], size[i] - 4) for i in (0, 1))
        edges = left, top, max(box[2] - 1, left + 3), max(box[3] - 1, top + 3)
        pen.rectangle(edges, outline=PAPER, width=4)
        inner = edges[0] + 1, edges[1] + 1, edges[2] - 1, edges[3] - 1
        pen.rectangle(inner, outline=color(number), width=2)
    return picture


def enlarged(view: SampleView) -> Image.Image:
    """A view in a cell: its pixels whole, or made smaller where there are too many."""
    picture, side = Image.fromarray(view.pixels), len(view.pixels)
    if side > CELL:
        return picture.resize((CELL, CELL), Image.Resampling.LANCZOS)
    times = CELL // side
    return picture.resize((side * times, side * times), Image.Resampling.NEAREST)


def _paste(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], picture: Image.Image
) -> None:
    left, top = corner
    pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), FRAME)
    offset = left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2
    sheet.paste(picture, offset)


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: Sequence[str]) -> None:
    for number, line in enumerate(text):
        pen.text((corner[0], corner[1] + 4 + number * LINE), line, INK, _font(TEXT_SIZE))


@functools.lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, so that a sheet looks alike on every machine."""
    return ImageFont.load_default(size)


def _fitted(text: str, width: int, size: int) -> str:
    """The text, or its two ends where it is longer than `width` pixels."""
    font = _font(size)
    length = len(text)
    fitted = text
    while font.getlength(fitted) > width and length > 2:
        length -= 1
        fitted = f"{text[: length // 2]}{ELLIPSIS}{text[len(text) - (length - length // 2) :]}"
    return fitted
