"""One image has one vector: as a file of a folder, its path, its bytes, Pillow's, or an array."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from btpipe.embed.encoder import load
from btpipe.embed.job import embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import UsageError
from btpipe.events import ignore

SIZE = (64, 48)
ROUNDED = {"p.tif": 0.9999}
"""Least cosine of kinds whose pixels every decoder rounds its own way: a palette of 16 bits."""


def smooth(channels: int) -> NDArray[np.uint8]:
    small = np.random.default_rng(channels).integers(0, 256, (channels, 6, 8), np.uint8)
    planes = [Image.fromarray(plane).resize(SIZE, Image.Resampling.BICUBIC) for plane in small]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def ramp(most: float, dtype: type) -> Image.Image:
    levels = np.linspace(0, most, SIZE[0] * SIZE[1])
    return Image.fromarray(levels.astype(dtype).reshape(SIZE[::-1]))


def drawn() -> dict[str, tuple[Image.Image, dict[str, object]]]:
    """A file name, the image in it, and how it is saved."""
    rgb, rgba = Image.fromarray(smooth(3)), Image.fromarray(smooth(4))
    grey, palette = rgb.convert("L"), rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = ramp(65_535, np.uint16)
    kinds: dict[str, tuple[Image.Image, dict[str, object]]] = {
        f"{mode}.{ending}": (image, {})
        for mode, image in {"rgb": rgb, "l": grey}.items()
        for ending in ("jpg", "png", "webp", "tif", "bmp", "ppm", "jp2")
    }
    kinds |= {f"rgba.{ending}": (rgba, {}) for ending in ("png", "webp", "tif", "jp2")}
    kinds |= {f"p.{ending}": (palette, {}) for ending in ("png", "tif", "bmp")}
    kinds |= {f"cmyk.{ending}": (rgb.convert("CMYK"), {}) for ending in ("jpg", "tif")}
    kinds |= {f"deep.{ending}": (deep, {}) for ending in ("png", "tif", "ppm", "jp2")}
    kinds |= {f"one.{ending}": (grey.convert("1"), {}) for ending in ("png", "bmp", "ppm")}
    kinds |= {f"turned.{ending}": (rgb, {"exif": turned}) for ending in ("jpg", "png")}
    return kinds | {
        "i.ppm": (ramp(65_535, np.int32), {}),
        "f.tif": (ramp(1, np.float32), {}),
        "la.png": (rgba.convert("LA"), {}),
        "see-through.png": (palette, {"transparency": 3}),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, (image, options) in drawn().items():
        image.save(tmp_path / "images" / name, **options)  # type: ignore[arg-type]
    return tmp_path / "images"


def different(
    vectors: NDArray[np.float32], expected: NDArray[np.float32], paths: list[Path]
) -> dict[str, float]:
    """The files whose vectors differ, but for those that may round, with their cosine."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (vectors * expected).sum(axis=1) / lengths
    is_same = (vectors == expected).all(axis=1)
    found = {
        p.name: float(c) for p, c, same in zip(paths, cosines, is_same, strict=True) if not same
    }
    return {name: c for name, c in found.items() if c < ROUNDED.get(name, 1.1)}


def test_each_kind_of_image_has_one_vector_however_it_comes(folder: Path, bundle: Path) -> None:
    embed(folder, folder.parent / "v.parquet", EncoderConfig(bundle, device="cpu"), ignore)
    table = pq.read_table(folder.parent / "v.parquet")
    assert sorted(table["path"].to_pylist()) == sorted(drawn())
    paths = [folder / name for name in table["path"].to_pylist()]
    expected = np.stack(table["embedding"].to_numpy())
    encoder = load(bundle, device="cpu")
    pillow = [Image.open(path) for path in paths]
    as_arrays = [ImageOps.exif_transpose(image).convert("RGB") for image in pillow]
    assert different(encoder.embed(pillow), expected, paths) == {}
    assert different(encoder.embed(path for path in paths), expected, paths) == {}
    assert different(encoder.embed([path.read_bytes() for path in paths]), expected, paths) == {}
    eight_bit = [i for i, path in enumerate(paths) if path.stem in ("rgb", "l", "turned")]
    arrays = encoder.embed([np.asarray(as_arrays[i]) for i in eight_bit])
    assert np.array_equal(arrays, expected[eight_bit])


@pytest.mark.parametrize(
    "make",
    [
        str,
        lambda path: path,
        lambda path: path.read_bytes(),
        lambda _: Image.fromarray(smooth(3)),
        lambda _: smooth(3),
    ],
)
def test_one_image_in_place_of_a_list_is_answered_by_how_to_name_it(
    folder: Path, bundle: Path, make: Callable[[Path], object]
) -> None:
    with pytest.raises(UsageError, match=r"a list of images(.|\n)*embed\(\[image\]\)"):
        load(bundle, device="cpu").embed(make(folder / "rgb.png"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("LAB", SIZE),
        ramp(70_000, np.int32),
        ramp(255, np.float32),
        ramp(float("nan"), np.float32),
        Image.new("RGB", (0, 4)),
    ],
)
def test_a_pillow_image_that_no_file_could_hold_is_refused(
    bundle: Path, image: Image.Image
) -> None:
    with pytest.raises(UsageError, match=r"image 1 is (.|\n)*to do: .*bring it to RGB first"):
        load(bundle, device="cpu").embed([Image.new("RGB", SIZE), image])


def test_bytes_that_are_no_image_are_named_by_their_position(bundle: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", SIZE).save(content, "JPEG")
    for bad in (b"", b"Dear reader,", content.getvalue()[:-30]):
        with pytest.raises(UsageError, match="image 1: "):
            load(bundle, device="cpu").embed([content.getvalue(), bad])
