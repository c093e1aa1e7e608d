"""Photograph-like JPEGs made in memory, for measuring without images. They teach a network nothing.

Random grids of every octave are summed, so that power falls with frequency as it does in
photographs: decoding and resizing cost about what they cost there.
"""

import functools
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from btpipe.data.params import key_of, philox

DIFFERENT = 64
"""Pictures that exist; number 64 shows what number 0 shows."""
QUALITY = 90
_COARSEST = 4
_FALL = 0.62
"""Amplitude of an octave over that of the next coarser one: 32 kB at 400 x 533, as photographs."""


@functools.lru_cache(maxsize=4 * DIFFERENT)
def jpeg(number: int, shorter_side: int) -> bytes:
    """The picture of a number as a JPEG, 3:4 or 4:3; always the same bytes of one Pillow."""
    number %= DIFFERENT
    longer = shorter_side * 4 // 3
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
