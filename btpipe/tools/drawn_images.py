"""Labelled sample images for the demo: ten families of patterns, drawn from a seed, offline.

What two views of an image share is what is learnt. So colours, light and noise are drawn without
regard to the class; angle, scale, position and line width are random; and each pattern fills its
image several times over: a crop still shows it. How much of the image its lines cover does tell
something: a linear classifier on colour histograms names 48 % of seed 0.
"""

import dataclasses
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from btpipe import artifact
from btpipe.errors import UsageError

Plane = NDArray[np.float64]

RECORD = "samples.json"
"""What the folder was drawn with; written last."""

PALETTES = np.array(
    [
        [[38, 70, 83], [233, 196, 106]],
        [[90, 24, 60], [240, 180, 190]],
        [[20, 60, 40], [170, 215, 160]],
        [[45, 45, 90], [240, 150, 90]],
    ],
    dtype=np.float64,
)
"""Dark and light, 0 to 255. Each class uses all of them, either colour as its ground."""

PERIOD = (0.14, 0.25)
"""Length of a pattern's period as a share of the image's side: four to seven of them across."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where the pixels lie, (size, size) each: `x`, `y` in pixels, `u`, `v` turned, in periods.

    `period` is in pixels.
    """

    x: Plane
    y: Plane
    u: Plane
    v: Plane
    period: float

    @property
    def size(self) -> int:
        return len(self.x)


Family = Callable[[np.random.Generator, Frame], Plane]
"""Draws a pattern: share of ink at each pixel, 0 to 1, (size, size)."""


def draw(
    folder: Path, *, train: int = 2000, test: int = 500, size: int = 96, seed: int = 0
) -> None:
    """Fills `folder` with `train/CLASS/NNNN.jpg` and `test/CLASS/NNNN.jpg`, as many of each class.

    Image i of a class depends on seed, split, class and i alone. A folder that was drawn with the
    same arguments is left as it is; its name never holds half of the images.

    Raises:
        UsageError: `folder` is there and was not drawn with these arguments.
        MachineError: no space, or no permission.
    """
    record = {"train": train, "test": test, "size": size, "seed": seed}
    if folder.exists():
        if _record(folder) == record:
            return
        raise UsageError("holds other images", where=folder, fix="name a folder that is not there")
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    with artifact.disk_errors(folder):
        try:
            for number, name in enumerate(FAMILIES):
                for split, (part, count) in enumerate((("train", train), ("test", test))):
                    target = temporary / part / name
                    target.mkdir(parents=True)
                    for i in range(count // len(FAMILIES)):
                        rng = np.random.default_rng([seed, split, number, i])
                        pixels = picture(name, rng, size)
                        Image.fromarray(pixels).save(target / f"{i:04d}.jpg", quality=90)
            (temporary / RECORD).write_text(json.dumps(record))
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _record(folder: Path) -> object:
    """What a folder was drawn with, None where nothing says so."""
    try:
        content: object = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return content


def picture(name: str, rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """One image of the family `name`: (size, size, 3)."""
    ink = FAMILIES[name](rng, _frame(rng, size))
    ground, figure = rng.permutation(PALETTES[rng.integers(len(PALETTES))])
    colours = ground + (figure - ground) * ink[..., None]
    light = rng.uniform(0.75, 1.2) + _slope(rng, size) * rng.uniform(0, 0.35)
    noise = rng.normal(size=(size, size, 1)) * rng.uniform(2, 12)
    shades = np.clip(colours * light[..., None] + noise, 0, 255)
    return np.asarray(shades, dtype=np.uint8)


def _frame(rng: np.random.Generator, size: int) -> Frame:
    """A random angle, scale and position."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    period = size * np.exp(rng.uniform(*np.log(PERIOD)))
    angle = rng.uniform(0, 2 * np.pi)
    u = (np.cos(angle) * x + np.sin(angle) * y) / period + rng.uniform(0, 100)
    v = (np.cos(angle) * y - np.sin(angle) * x) / period + rng.uniform(0, 100)
    return Frame(x, y, u, v, float(period))


def _slope(rng: np.random.Generator, size: int) -> Plane:
    """Light from one side: from about -1 to 1 across the image, in a random direction."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray(np.cos(angle) * x + np.sin(angle) * y)


def _inside(distance: Plane) -> Plane:
    """Ink by the signed distance to an edge, in pixels, negative inside; 1 pixel of soft edge."""
    return np.clip(0.5 - distance, 0, 1)


def _lines(phase: Plane, width: float, period: float | Plane) -> Plane:
    """Lines at phase 0.5, 1.5, ...; `width` is a share of the period, `period` in pixels."""
    return _inside((np.abs(phase - np.floor(phase) - 0.5) - width / 2) * period)


def _nearest_centre(rng: np.random.Generator, frame: Frame, spacing: float) -> tuple[Plane, Plane]:
    """Offset of each pixel to the nearest of some scattered centres, in pixels.

    The centres lie on a turned lattice of `spacing` periods, each moved by up to a fifth of it.
    """
    moved = rng.uniform(-0.2, 0.2, size=(2, 16, 16))
    a, b = frame.u / spacing, frame.v / spacing
    column, row = np.floor(a).astype(int), np.floor(b).astype(int)
    square, across, down = np.full_like(a, np.inf), np.zeros_like(a), np.zeros_like(a)
    for i in (-1, 0, 1):  # the nearest centre lies in the pixel's cell or beside it
        for j in (-1, 0, 1):
            du, dv = moved[:, (column + i) % 16, (row + j) % 16]
            da, db = a - (column + i + 0.5 + du), b - (row + j + 0.5 + dv)
            nearer = da**2 + db**2 < square
            square = np.where(nearer, da**2 + db**2, square)
            across, down = np.where(nearer, da, across), np.where(nearer, db, down)
    return across * spacing * frame.period, down * spacing * frame.period


def blobs(rng: np.random.Generator, frame: Frame) -> Plane:
    """Islands of a random field of waves, all about one period long."""
    total = np.zeros_like(frame.u)
    for _ in range(16):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        wave = 2 * np.pi * rng.uniform(0.55, 0.75)
        total += np.cos(wave * (np.cos(angle) * frame.u + np.sin(angle) * frame.v) + phase)
    height = total / total.std() + rng.uniform(-0.3, 0.3)
    return _inside(-height * frame.period / (2 * np.pi * 0.65))


def bricks(rng: np.random.Generator, frame: Frame) -> Plane:
    """Courses of bricks two periods long, every second one moved by half a brick."""
    joint = rng.uniform(0.14, 0.26)
    along = frame.u / 2 + 0.5 * (np.floor(frame.v - 0.5) % 2)
    courses = _lines(frame.v, joint, frame.period)
    return np.asarray(np.maximum(courses, _lines(along, joint / 2, 2 * frame.period)))


def checks(rng: np.random.Generator, frame: Frame) -> Plane:
    """A chessboard with fields of 0.7 of a period."""
    del rng  # a chessboard has nothing to choose
    a = _lines(frame.u / 1.4, 0.5, 1.4 * frame.period)
    b = _lines(frame.v / 1.4, 0.5, 1.4 * frame.period)
    return a * (1 - b) + b * (1 - a)


def dots(rng: np.random.Generator, frame: Frame) -> Plane:
    """Discs on a square or a staggered lattice."""
    stagger = 0.5 * rng.integers(2) * (np.floor(frame.v) % 2)
    a, b = frame.u + stagger, frame.v
    radius = np.hypot(a - np.floor(a) - 0.5, b - np.floor(b) - 0.5)
    return _inside((radius - rng.uniform(0.22, 0.36)) * frame.period)


def hatch(rng: np.random.Generator, frame: Frame) -> Plane:
    """Two sets of thin lines that cross at 50 to 90 degrees."""
    angle, width = rng.uniform(np.radians(50), np.radians(90)), rng.uniform(0.14, 0.26)
    second = np.cos(angle) * frame.u + np.sin(angle) * frame.v
    first_lines = _lines(frame.u, width, frame.period)
    return np.asarray(np.maximum(first_lines, _lines(second, width, frame.period)))


def rays(rng: np.random.Generator, frame: Frame) -> Plane:
    """Stars: wedges around scattered centres."""
    a, b = _nearest_centre(rng, frame, spacing=2.6)
    wedges = int(rng.integers(8, 13))
    turns = np.arctan2(b, a) / (2 * np.pi) * wedges + rng.uniform(0, 1)
    arc = 2 * np.pi * np.hypot(a, b) / wedges
    return _lines(turns, rng.uniform(0.4, 0.6), arc)


def rings(rng: np.random.Generator, frame: Frame) -> Plane:
    """Circles around scattered centres."""
    a, b = _nearest_centre(rng, frame, spacing=2.6)
    step = 0.55
    radius = np.hypot(a, b) / (step * frame.period) + rng.uniform(0, 1)
    return _lines(radius, rng.uniform(0.35, 0.6), step * frame.period)


def stripes(rng: np.random.Generator, frame: Frame) -> Plane:
    """Straight stripes."""
    return _lines(frame.u, rng.uniform(0.3, 0.7), frame.period)


def waves(rng: np.random.Generator, frame: Frame) -> Plane:
    """Stripes that swing like a sine."""
    swing = rng.uniform(0.4, 0.6) * np.sin(2 * np.pi * frame.v / rng.uniform(2.0, 2.6))
    return _lines(frame.u + swing, rng.uniform(0.35, 0.6), frame.period)


def zigzag(rng: np.random.Generator, frame: Frame) -> Plane:
    """Stripes that go to and fro in straight strokes."""
    turns = frame.v / rng.uniform(1.5, 2.0)
    stroke = 4 * np.abs(turns - np.floor(turns) - 0.5) - 1
    return _lines(frame.u + rng.uniform(0.5, 0.8) * stroke, rng.uniform(0.35, 0.6), frame.period)


FAMILIES: Mapping[str, Family] = {
    "blobs": blobs,
    "bricks": bricks,
    "checks": checks,
    "dots": dots,
    "hatch": hatch,
    "rays": rays,
    "rings": rings,
    "stripes": stripes,
    "waves": waves,
    "zigzag": zigzag,
}
