"""The DALI graphs: the training views of an image, its evaluation view, and decoding alone.

Views are made of decoded images, on the CPU without a driver (`gpu=None`) or on a GPU: the same
graph. EXIF orientation is applied everywhere (the published code ignores it). Every graph of views
takes `serial` in and gives it back, so that no output is matched by position.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from btpipe import recipe
from btpipe.data.pipeline.augment_params import Draws

Inputs = dict[str, NDArray[np.generic]]
"""What a graph takes beside the encoded files: from input name to a row for each sample."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The evaluation view: shorter side to `resize` pixels, then the central `size` x `size`."""

    size: int
    resize: int
    interpolation: Literal["bilinear"] = "bilinear"

    @classmethod
    def for_size(cls, size: int) -> "Geometry":
        """The same field of view at every size: 256 for 224."""
        return cls(size, round(size / 0.875))


def training_pipeline(
    views: Sequence[recipe.View],
    sizes: Sequence[int],
    *,
    batch_size: int,
    threads: int,
    gpu: int | None,
) -> Pipeline:
    """Outputs: each view (n, size, size, 3) uint8, and serial (n, 1)."""

    def graph() -> tuple[DataNode, ...]:
        image = _image(gpu)
        # DALI rewrites this function: a plain index is what it takes.
        outputs = [_training_view(image, views[i], f"{i}.", sizes[i]) for i in range(len(views))]
        return (*outputs, _input("serial", 1, types.INT64))

    return _defined(graph, batch_size, threads, gpu)


def training_inputs(draws: Sequence[Draws], sizes: NDArray[np.int64]) -> Inputs:
    """What `training_pipeline` takes for draws of images of these sizes (n, 2) [height, width].

    Swapped ends mirror a crop for free. A quarter turn against the clock mirrors in x and then
    transposes, a half turn mirrors in both, a quarter turn with the clock mirrors in y and
    transposes.
    """
    inputs: Inputs = {}
    for i, view in enumerate(draws):
        in_y = view.vertical_flip ^ (view.turns >= 2)
        in_x = view.flip ^ np.isin(view.turns, (1, 2))
        mirrored = np.stack([in_y, in_x], axis=1)
        start, end = view.crop_start / sizes, view.crop_end / sizes
        inputs |= {
            f"{i}.start": np.where(mirrored, end, start).astype(np.float32),
            f"{i}.end": np.where(mirrored, start, end).astype(np.float32),
            f"{i}.transpose": view.turns % 2 == 1,
            f"{i}.recolor": view.jitter | view.gray,
            f"{i}.color_matrix": view.color_matrix,
            f"{i}.color_offset": view.color_offset,
            f"{i}.mean_matrix": view.mean_matrix,
            f"{i}.blur": view.blur_sigma > 0,
            f"{i}.blur_sigma": np.maximum(view.blur_sigma, np.float32(0.01)),  # DALI refuses 0
            f"{i}.solarize": view.solarize,
        }
    return inputs


def evaluation_pipeline(
    geometry: Geometry, *, batch_size: int, threads: int, gpu: int | None
) -> Pipeline:
    """Outputs: pixels (n, size, size, 3) uint8, and serial (n, 1)."""

    def graph() -> tuple[DataNode, ...]:
        pixels = _resized(_image(gpu), "", geometry.size, types.INTERP_LINEAR)
        return pixels, _input("serial", 1, types.INT64)

    return _defined(graph, batch_size, threads, gpu)


def evaluation_inputs(geometry: Geometry, sizes: NDArray[np.int64]) -> Inputs:
    """What `evaluation_pipeline` takes for images of these sizes (n, 2) [height, width].

    The centre crop of the resized image is a region of the original one: only what is seen is
    resized, whatever the aspect ratio. Sizes and offsets round as torchvision's do.
    """
    shorter = sizes.min(axis=1, keepdims=True)
    resized = np.where(sizes == shorter, geometry.resize, geometry.resize * sizes // shorter)
    offset = np.rint((resized - geometry.size) / 2)
    start, end = offset / resized, (offset + geometry.size) / resized
    return {"start": start.astype(np.float32), "end": end.astype(np.float32)}


def decoding_pipeline() -> Pipeline:
    """Decodes one file on the CPU."""

    def graph() -> tuple[DataNode, ...]:
        decoded = fn.decoders.image(
            _input("encoded", 1, types.UINT8),
            device="cpu",
            output_type=types.RGB,
            adjust_orientation=True,
            jpeg_fancy_upsampling=True,  # as libjpeg
        )
        return (decoded,)

    return _defined(graph, 1, 1, None)


def _defined(
    graph: Callable[[], tuple[DataNode, ...]], batch_size: int, threads: int, gpu: int | None
) -> Pipeline:
    """The graph as a pipeline that is built at its first use, with `if` on a sample's own values.

    With a queue of one, every `schedule_run` starts one run (more make the first call start more);
    runs may be scheduled ahead all the same.
    """
    define = pipeline_def(
        graph,
        enable_conditionals=True,
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=1,
    )
    return define()


def _input(name: str, dimensions: int, dtype: types.DALIDataType) -> DataNode:
    return fn.external_source(name=name, ndim=dimensions, dtype=dtype)


def _image(gpu: int | None) -> DataNode:
    """The decoded image, in the memory of the host or of the GPU (see `decoding`)."""
    device = "cpu" if gpu is None else "gpu"
    return fn.external_source(name="image", ndim=3, dtype=types.UINT8, layout="HWC", device=device)


def _resized(
    image: DataNode, prefix: str, size: int, interpolation: types.DALIInterpType
) -> DataNode:
    """A region of the image, resized. DALI reads outside an image that is smaller than expected,
    and dies of it; as shares of the image, no region can be outside.
    """
    return fn.resize(
        image,
        size=[size, size],
        roi_start=_input(f"{prefix}start", 1, types.FLOAT),
        roi_end=_input(f"{prefix}end", 1, types.FLOAT),
        roi_relative=True,
        interp_type=interpolation,
        antialias=True,
    )


def _training_view(image: DataNode, view: recipe.View, prefix: str, size: int) -> DataNode:
    """Crop, resize, flip, turn, colours, blur, solarise.

    What a sample does not draw is not computed.
    """
    pixels = _resized(image, prefix, size, types.INTERP_CUBIC)
    transpose = _input(f"{prefix}transpose", 0, types.BOOL)
    if transpose:
        pixels = fn.transpose(pixels, perm=[1, 0, 2], transpose_layout=False, output_layout="HWC")
    recolor = _input(f"{prefix}recolor", 0, types.BOOL)
    matrix = _input(f"{prefix}color_matrix", 2, types.FLOAT)
    offset = _input(f"{prefix}color_offset", 1, types.FLOAT)
    mean_matrix = _input(f"{prefix}mean_matrix", 2, types.FLOAT)
    blur = _input(f"{prefix}blur", 0, types.BOOL)
    sigma = _input(f"{prefix}blur_sigma", 0, types.FLOAT)
    solarize = _input(f"{prefix}solarize", 0, types.BOOL)
    if recolor:
        # An argument of an operator is taken from host memory, also by the GPU's operators.
        mean = fn.reductions.mean(pixels, axes=[0, 1], keep_dims=True).cpu()
        shift = fn.coord_transform(mean, M=mean_matrix, T=offset)
        pixels = fn.coord_transform(
            pixels, M=matrix, T=fn.reshape(shift, shape=[3]), dtype=types.UINT8
        )
    if blur:
        pixels = fn.gaussian_blur(pixels, sigma=sigma)
    if solarize:
        pixels = pixels ^ fn.cast((pixels >= view.solarize.threshold) * 255, dtype=types.UINT8)
    return pixels
