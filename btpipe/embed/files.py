"""Images that somebody names or holds one by one, as the evaluation view's pixels."""

import concurrent.futures
import functools
import io
import itertools
import os
from collections.abc import Iterable, Iterator
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

Image = Path | str | bytes | NDArray[np.uint8] | PIL.Image.Image
"""A file; what is in one; upright RGB pixels `(H, W, 3)`; Pillow's, turned as its EXIF says."""
_MOST_GREY = {"I": 65_535, "F": 1}
"""White, by the first letter of Pillow's mode: as DALI takes a file of 16 bits, or of floats."""


def pixels(
    images: Iterable[Image], geometry: Geometry, batch_size: int, gpu: int | None
) -> Iterator[NDArray[np.uint8]]:
    """Batches of uint8 `(n, S, S, 3)`, one row for each image, in their order.

    Pixels are those of the embedding job, whichever way an image comes: Pillow's are brought to 8
    bits as DALI does it, and their alpha is dropped.

    `gpu`: which one decodes and resizes, as in an embedding job; None: the CPU.

    Raises:
        UsageError: one image in place of several; a file that is missing, no image, or damaged; an
            array of another shape or type, or a kind of Pillow image that no file has; named.
    """
    if isinstance(images, Path | str | bytes | PIL.Image.Image):
        raise UsageError("one image", expected="a list of images", fix="name it so: embed([image])")
    waiting = enumerate(images)
    threads = runtime.cores()
    decoder = None if gpu is None else decode.batch_decoder(gpu, threads)
    read = functools.partial(_read, in_batches=decoder is not None)

    def loads() -> Iterator[dali_runner.DaliBatch]:
        for number in itertools.count():
            part = list(itertools.islice(waiting, batch_size))
            if not part:
                return
            contents = list(pool.map(lambda entry: read(*entry), part))
            decoded = decoder.decode(contents) if decoder else contents
            arrays = [_whole(content, *entry) for content, entry in zip(decoded, part, strict=True)]
            inputs = dali_graphs.evaluation_inputs(geometry, dali_runner.sizes_of(arrays))
            yield dali_runner.DaliBatch(number, np.arange(len(arrays)), arrays, inputs)

    def build() -> Pipeline:
        return dali_graphs.evaluation_pipeline(
            geometry, batch_size=batch_size, threads=threads, gpu=gpu
        )

    with concurrent.futures.ThreadPoolExecutor(threads, "btpipe-decode") as pool:
        for _, outputs in dali_runner.run(loads(), build, decoder.stream if decoder else None):
            yield dali_runner.copied(outputs[0])


def _whole(content: Encoded | Pixels | BadInputError, position: int, image: Image) -> Pixels:
    """The pixels; raises UsageError where a file has none."""
    assert not isinstance(content, Encoded)
    if isinstance(content, BadInputError):
        raise UsageError(content.reason, where=_name(position, image))
    return content


def _name(position: int, image: Image) -> Path | str:
    return Path(image) if isinstance(image, str | Path) else f"image {position}"


def _read(position: int, image: Image, *, in_batches: bool) -> Encoded | NDArray[np.uint8]:
    """Upright RGB pixels `(H, W, 3)`, or a file that is decoded in a batch."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UsageError(
                f"image {position} is {image.dtype} {image.shape}", expected="uint8 (H, W, 3)"
            )
        return np.ascontiguousarray(image)
    if isinstance(image, PIL.Image.Image):
        return _of_pillow(position, PIL.ImageOps.exif_transpose(image))
    path = _name(position, image)
    try:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        header.look(io.BytesIO(content), os.fsencode(path))
        file = np.frombuffer(content, np.uint8)
        encoded = decode.parse(file) if in_batches else None
        return encoded or decode.decode(file)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path) from error
    except BadInputError as error:
        raise UsageError(error.reason, where=path, expected="an image file") from error


def _of_pillow(position: int, image: PIL.Image.Image) -> NDArray[np.uint8]:
    """RGB pixels `(H, W, 3)` of an upright image in any mode, as DALI makes them of its file.

    Raises:
        UsageError: a mode that no file has for DALI, grey levels that are out of range, no pixels.
    """
    what, fix = f"image {position} is {image.size} of mode {image.mode}", "bring it to RGB first"
    if image.mode == "LAB" or not all(image.size):
        raise UsageError(
            what, expected="grey, RGB, CMYK, a palette, with alpha or without", fix=fix
        )
    most = _MOST_GREY.get(image.mode[0])
    if most is None:
        try:
            return np.array(image.convert("RGB"))
        except ValueError as error:
            raise UsageError(what, expected="a mode that becomes RGB", fix=fix) from error
    levels = np.asarray(image)
    if not 0 <= levels.min() <= levels.max() <= most:  # a NaN is no such level either
        span = f"levels {levels.min():g} to {levels.max():g}"
        fix = "scale them, or bring it to RGB first"
        raise UsageError(f"{what}, with {span}", expected=f"0 to {most}", fix=fix)
    grey = np.rint(levels * np.float32(255) if most == 1 else levels / 257).astype(np.uint8)
    return np.stack([grey] * 3, axis=-1)
