"""docs/formats.md is true: each kind is drawn, scanned, and shown to the evaluation view."""

import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from btpipe.data import index
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.eval_loader import evaluation_batches
from btpipe.data.scan import Scan, scan
from btpipe.events import ignore

TABLE = Path(__file__).parents[3] / "docs" / "formats.md"
COLOUR, SECOND = (200, 90, 30), (0, 0, 255)
LEVELS = 2
"""Grey levels between decoders on a plain area: rounding of YCbCr, and of 16-bit palettes."""
DEEP = 40_000
"""Of 65,535: 155.6 of 255."""

Make = Callable[[], bytes]


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    content = io.BytesIO()
    (image or plain()).save(content, kind, **options)
    return content.getvalue()


def plain(mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", (40, 30), COLOUR)
    return (
        image.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
    )


def see_through(mode: str = "RGBA") -> Image.Image:
    image = plain("RGBA")
    image.putalpha(100)
    return image.convert(mode)


def deep() -> Image.Image:
    return Image.fromarray(np.full((30, 40), DEEP, np.uint16))


def several(kind: str) -> bytes:
    second = Image.new("RGB", (40, 30), SECOND)
    return encoded(kind, save_all=True, append_images=[second])


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says that its first three channels are YCbCr."""
    content = encoded("JPEG", plain("CMYK"))
    at = content.index(b"Adobe") + 11
    return content[:at] + b"\x02" + content[at + 1 :]


KINDS: dict[str, Make] = {
    "JPEG": lambda: encoded("JPEG"),
    "JPEG, progressive": lambda: encoded("JPEG", progressive=True),
    "JPEG, grey": lambda: encoded("JPEG", plain("L")),
    "JPEG, CMYK": lambda: encoded("JPEG", plain("CMYK")),
    "JPEG, YCCK": ycck,
    "MPO": lambda: several("MPO"),
    "PNG": lambda: encoded("PNG"),
    "PNG, alpha": lambda: encoded("PNG", see_through()),
    "PNG, grey and alpha": lambda: encoded("PNG", see_through("LA")),
    "PNG, palette": lambda: encoded("PNG", plain("P")),
    "PNG, palette with a transparent entry": lambda: encoded("PNG", plain("P"), transparency=0),
    "PNG, 1-bit": lambda: encoded("PNG", Image.new("1", (40, 30), 1)),
    "PNG, 16-bit grey": lambda: encoded("PNG", deep()),
    "PNG, animated": lambda: several("PNG"),
    "WebP": lambda: encoded("WEBP"),
    "WebP, lossless": lambda: encoded("WEBP", lossless=True),
    "WebP, alpha": lambda: encoded("WEBP", see_through()),
    "WebP, animated": lambda: several("WEBP"),
    "TIFF": lambda: encoded("TIFF"),
    "TIFF, LZW": lambda: encoded("TIFF", compression="tiff_lzw"),
    "TIFF, JPEG inside": lambda: encoded("TIFF", compression="jpeg"),
    "TIFF, grey": lambda: encoded("TIFF", plain("L")),
    "TIFF, alpha": lambda: encoded("TIFF", see_through()),
    "TIFF, palette": lambda: encoded("TIFF", plain("P")),
    "TIFF, CMYK": lambda: encoded("TIFF", plain("CMYK")),
    "TIFF, 16-bit grey": lambda: encoded("TIFF", deep()),
    "TIFF, 32-bit float": lambda: encoded("TIFF", Image.new("F", (40, 30), DEEP / 65_535)),
    "TIFF, grey and alpha": lambda: encoded("TIFF", see_through("LA")),
    "TIFF, LAB": lambda: encoded("TIFF", Image.new("LAB", (40, 30), COLOUR)),
    "TIFF, several pages": lambda: several("TIFF"),
    "TIFF, 1-bit": lambda: encoded("TIFF", Image.new("1", (40, 30), 1)),
    "BMP": lambda: encoded("BMP"),
    "BMP, grey": lambda: encoded("BMP", plain("L")),
    "BMP, 1-bit": lambda: encoded("BMP", Image.new("1", (40, 30), 1)),
    "BMP, palette": lambda: encoded("BMP", plain("P")),
    "PPM": lambda: encoded("PPM"),
    "PGM": lambda: encoded("PPM", plain("L")),
    "PGM, 16-bit": lambda: encoded("PPM", deep()),
    "PBM": lambda: encoded("PPM", Image.new("1", (40, 30), 1)),
    "JPEG 2000": lambda: encoded("JPEG2000"),
    "JPEG 2000, grey": lambda: encoded("JPEG2000", plain("L")),
    "JPEG 2000, alpha": lambda: encoded("JPEG2000", see_through()),
    "JPEG 2000, 16-bit grey": lambda: encoded("JPEG2000", deep()),
    "GIF": lambda: encoded("GIF"),
    "GIF, animated": lambda: several("GIF"),
    "AVIF": lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(200),
    "HEIC": lambda: b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(200),
    "ICO": lambda: encoded("ICO"),
    "Photoshop": lambda: b"8BPS\0\1" + bytes(200),
    "JPEG XL": lambda: b"\xff\x0a" + bytes(200),
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "PDF": lambda: b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n",
    "SVG": lambda: b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table."""

    mode: str
    outcome: str

    @property
    def rejected(self) -> str:
        """The start of the reason, or nothing."""
        return self.outcome.partition("rejected: ")[2]


def lines() -> dict[str, Line]:
    cells = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", TABLE.read_text(), re.MULTILINE)
    return {kind: Line(mode, outcome) for kind, mode, outcome in cells if kind != "kind"}


def expected(kind: str, outcome: str) -> tuple[int, int, int]:
    """What a line says of the one colour that each image has."""
    if "scaled to 8 bits" in outcome:
        return (round(DEEP / 257),) * 3
    if outcome == "black and white":
        return (255, 255, 255)
    if outcome == "as Pillow" or "profiles" in outcome:
        with Image.open(io.BytesIO(KINDS[kind]())) as image:
            return image.convert("RGB").getpixel((20, 15))  # type: ignore[return-value]
    grey = plain("L").getpixel((0, 0))
    return (grey,) * 3 if "grey" in kind else COLOUR  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind under a name that says nothing of it."""
    path = tmp_path_factory.mktemp("formats") / "images"
    path.mkdir()
    for i, make in enumerate(KINDS.values()):
        (path / f"{i:02}.jpg").write_bytes(make())
    return path


@pytest.fixture(scope="module")
def scanned(folder: Path) -> Scan:
    return scan(folder, folder.parent / "index.parquet", ignore, depth="decode")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, NDArray[np.uint8] | str]:
    """Path to the middle pixel of its evaluation view, or to the reason that there is none."""
    images, refused = index.build(folder)
    results: dict[str, NDArray[np.uint8] | str] = {event.path: event.reason for event in refused}
    names, rows = images.table["path"].to_pylist(), np.arange(len(images))
    geometry = Geometry.for_size(32)
    for batch in evaluation_batches(images, rows, geometry, batch_size=16, threads=2):
        results |= {names[row]: bad.reason for row, bad in batch.rejected.items()}
        good = zip(batch.rows.tolist(), batch.pixels, strict=True)
        results |= {names[row]: pixels[16, 16].copy() for row, pixels in good}
    return results


def test_the_table_has_a_line_for_each_kind_that_is_drawn() -> None:
    assert list(lines()) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_becomes_what_the_table_says(
    kind: str, scanned: Scan, seen: dict[str, NDArray[np.uint8] | str]
) -> None:
    line, path = lines()[kind], f"{list(KINDS).index(kind):02}.jpg"
    reasons = {reject.path: reject.reason for reject in scanned.rejects}
    modes = dict(zip(*(scanned.index.table[c].to_pylist() for c in ("path", "mode")), strict=True))
    pixel = seen[path]
    if line.rejected:
        assert reasons[path].startswith(line.rejected)
        assert pixel == reasons[path]
        return
    assert path not in reasons
    assert modes[path] == line.mode
    assert not isinstance(pixel, str)
    difference = np.abs(pixel.astype(int) - expected(kind, line.outcome))
    assert difference.max() <= LEVELS, (pixel, expected(kind, line.outcome))
