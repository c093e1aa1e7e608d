"""Images that somebody names or holds one by one, as the evaluation view's pixels."""

import concurrent.futures
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from btpipe import runtime
from btpipe.data import decoding, header, runs, views
from btpipe.data.views import Geometry
from btpipe.errors import UsageError

Image = Path | str | NDArray[np.uint8] | PIL.Image.Image
"""A file; upright RGB pixels `(H, W, 3)`; an image of Pillow's, turned as its EXIF says."""


def pixels(
    images: Sequence[Image], geometry: Geometry, batch_size: int
) -> Iterator[NDArray[np.uint8]]:
    """Batches of uint8 `(n, S, S, 3)`, one row for each image, in their order.

    Raises:
        UsageError: a file that is missing, no image, or damaged, or an array of another shape or
            type; the message names it.
    """
    if not images:
        return
    threads = runtime.cores()

    def load(number: int, decoded: list[NDArray[np.uint8]]) -> runs.Load:
        sizes = np.array([image.shape[:2] for image in decoded], np.int64)
        inputs = views.evaluation_inputs(geometry, sizes)
        return runs.Load(number, np.arange(len(decoded)), decoded, sizes, inputs)

    def loads() -> Iterator[runs.Load]:
        for number, start in enumerate(range(0, len(images), batch_size)):
            part = images[start : start + batch_size]
            places = range(start, start + len(part))
            yield load(number, list(pool.map(_decoded, places, part)))

    def resize(found: runs.Load, sizes: NDArray[np.int64]) -> runs.Load:
        return dataclasses.replace(
            found, sizes=sizes, inputs=views.evaluation_inputs(geometry, sizes)
        )

    with concurrent.futures.ThreadPoolExecutor(threads, "btpipe-decode") as pool:
        for _, outputs in runs.run(
            loads(),
            lambda: views.evaluation_pipeline(
                geometry, batch_size=batch_size, threads=threads, gpu=None
            ),
            mend=lambda found, _: found,
            resize=resize,
            pool=pool,
            gpu=None,
        ):
            yield runs.copied(outputs[0])


def _decoded(place: int, image: Image) -> NDArray[np.uint8]:
    """Upright RGB pixels `(H, W, 3)`."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UsageError(
                f"image {place} is {image.dtype} {image.shape}", expected="uint8 (H, W, 3)"
            )
        return np.ascontiguousarray(image)
    if isinstance(image, PIL.Image.Image):
        return np.array(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    path = Path(image)
    try:
        found, content = header.read(path), path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path) from error
    if isinstance(found, header.Refusal):
        raise UsageError(found.reason, where=path, expected="an image file")
    decoded = decoding.decode(np.frombuffer(content, np.uint8), None)
    if isinstance(decoded, str):
        raise UsageError(decoded, where=path)
    return decoded
