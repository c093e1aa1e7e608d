"""Photograph-like JPEGs made in memory, `synthetic:COUNTxSIZE`, for measuring without images.

Random grids of every octave are summed, so that power falls with frequency as it does in
photographs: decoding and resizing cost about what they cost there. They teach a network nothing.
"""

import functools
import io
import re

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from btpipe.data.pipeline.augment_params import key_of, philox
from btpipe.data.sources.rows import SCHEMA, SourceRows
from btpipe.data.sources.source import Source
from btpipe.errors import UsageError

DIFFERENT = 32
"""Pictures that exist; number 32 shows what number 0 shows. Making one takes up to 0.1 s."""
QUALITY = 90
_COARSEST = 4
_FALL = 0.62
"""Amplitude of an octave over that of the next coarser one: 32 kB at 400 x 533, as photographs."""


def describe(name: str) -> Source:
    """The source that `synthetic:COUNTxSIZE` names; SIZE is the shorter side in pixels.

    Raises:
        UsageError: not two numbers.
    """
    if not re.fullmatch(r"synthetic:[1-9]\d{0,8}x[1-9]\d{0,3}", name):
        expected = "synthetic:COUNTxSIZE, such as synthetic:10000x400"
        raise UsageError("names no synthetic images", where=name, expected=expected)
    return Source("synthetic", name, f"{name}::")


def look(source: Source) -> SourceRows:
    """All images of the source."""
    count, shorter_side = _numbers(source)
    numbers = np.arange(count)
    lengths = np.array([len(jpeg(i, shorter_side)) for i in range(min(count, DIFFERENT))])
    is_wide, ones = numbers % 2 == 1, np.ones(count, np.int64)
    longer = _longer(shorter_side)
    columns = {
        "path": [f"{source.prefix}{number:09d}.jpg" for number in numbers],
        "path_bytes": pa.nulls(count, pa.binary()),
        "source": 0 * ones,
        "offset": numbers,
        "bytes": lengths[numbers % DIFFERENT],
        "mtime_ns": 0 * ones,
        "width": np.where(is_wide, longer, shorter_side),
        "height": np.where(is_wide, shorter_side, longer),
        "orientation": ones,
        "format": pa.array(["JPEG"]).take(pa.array(0 * ones)),
        "mode": pa.array(["RGB"]).take(pa.array(0 * ones)),
        "digest": pa.nulls(count, pa.string()),
        "label": pa.nulls(count, pa.string()),
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
    return SourceRows([pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)], [])


def read(source: Source, number: int) -> bytes:
    """The content of an image of the source."""
    return jpeg(number % DIFFERENT, _numbers(source)[1])


def _numbers(source: Source) -> tuple[int, int]:
    count, _, shorter_side = source.place.removeprefix("synthetic:").partition("x")
    return int(count), int(shorter_side)


def _longer(shorter_side: int) -> int:
    return shorter_side * 4 // 3


@functools.lru_cache(maxsize=4 * DIFFERENT)
def jpeg(number: int, shorter_side: int) -> bytes:
    """The picture of a number as a JPEG, 3:4 or 4:3; always the same bytes of one Pillow."""
    number %= DIFFERENT
    longer = _longer(shorter_side)
    width, height = (longer, shorter_side) if number % 2 else (shorter_side, longer)
    total = np.full((height, width, 3), 128.0)
    amplitude, cells, octave = 90.0, _COARSEST, 0
    while cells <= shorter_side:
        grid = Image.fromarray(_noise(number, octave, cells))
        smooth = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), np.float64)
        shades = smooth if octave < 3 else smooth.mean(axis=2, keepdims=True)  # colours are coarse
        total += amplitude * (shades / 127.5 - 1)
        amplitude, cells, octave = amplitude * _FALL, cells * 2, octave + 1
    content = io.BytesIO()
    pixels = np.clip(total, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(content, format="JPEG", quality=QUALITY)
    return content.getvalue()


def _noise(number: int, octave: int, cells: int) -> NDArray[np.uint8]:
    """(cells, cells, 3), the same with every version of numpy."""
    count = -(-cells * cells * 3 // 16)
    counter = np.zeros((count, 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1], counter[:, 2] = np.arange(count), octave, number
    words = philox(counter, key_of(0)).astype("<u4")
    return words.view(np.uint8).ravel()[: cells * cells * 3].reshape(cells, cells, 3)
