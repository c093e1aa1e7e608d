"""Images that somebody names or holds one by one, as the evaluation view's pixels."""

import concurrent.futures
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from btpipe import runtime
from btpipe.data import header
from btpipe.data.pipeline import dali_graphs, dali_runner, decode
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.decode import Encoded, Pixels
from btpipe.data.rejects import BadInputError
from btpipe.errors import UsageError

Image = Path | str | NDArray[np.uint8] | PIL.Image.Image
"""A file; upright RGB pixels `(H, W, 3)`; an image of Pillow's, turned as its EXIF says."""


def pixels(
    images: Sequence[Image], geometry: Geometry, batch_size: int, gpu: int | None
) -> Iterator[NDArray[np.uint8]]:
    """Batches of uint8 `(n, S, S, 3)`, one row for each image, in their order.

    `gpu`: which one decodes and resizes, as in an embedding job; None: the CPU.

    Raises:
        UsageError: a file that is missing, no image, or damaged, or an array of another shape or
            type; the message names it.
    """
    if not images:
        return
    threads = runtime.cores()
    decoder = None if gpu is None else decode.batch_decoder(gpu, threads)
    read = functools.partial(_read, in_batches=decoder is not None)

    def loads() -> Iterator[dali_runner.DaliBatch]:
        for number, start in enumerate(range(0, len(images), batch_size)):
            part = images[start : start + batch_size]
            contents = list(pool.map(read, range(start, start + len(part)), part))
            decoded = decoder.decode(contents) if decoder else contents
            arrays = [_whole(content, image) for content, image in zip(decoded, part, strict=True)]
            inputs = dali_graphs.evaluation_inputs(geometry, dali_runner.sizes_of(arrays))
            yield dali_runner.DaliBatch(number, np.arange(len(arrays)), arrays, inputs)

    def build() -> Pipeline:
        return dali_graphs.evaluation_pipeline(
            geometry, batch_size=batch_size, threads=threads, gpu=gpu
        )

    with concurrent.futures.ThreadPoolExecutor(threads, "btpipe-decode") as pool:
        for _, outputs in dali_runner.run(loads(), build, decoder.stream if decoder else None):
            yield dali_runner.copied(outputs[0])


def _whole(content: Encoded | Pixels | BadInputError, image: Image) -> Pixels:
    """The pixels; raises UsageError where a file has none."""
    assert not isinstance(content, Encoded)
    if isinstance(content, BadInputError):
        assert isinstance(image, str | Path)
        raise UsageError(content.reason, where=image)
    return content


def _read(position: int, image: Image, *, in_batches: bool) -> Encoded | NDArray[np.uint8]:
    """Upright RGB pixels `(H, W, 3)`, or a file that is decoded in a batch."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UsageError(
                f"image {position} is {image.dtype} {image.shape}", expected="uint8 (H, W, 3)"
            )
        return np.ascontiguousarray(image)
    if isinstance(image, PIL.Image.Image):
        return np.array(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    path = Path(image)
    try:
        header.read(path)
        file = np.frombuffer(path.read_bytes(), np.uint8)
        encoded = decode.parse(file) if in_batches else None
        return encoded or decode.decode(file)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path) from error
    except BadInputError as error:
        raise UsageError(error.reason, where=path, expected="an image file") from error
