"""Images that a bundle brings along with their vectors: does it still fit where it is opened?

What drifts from machine to machine is less the network than what is before it: decoding, turning,
resizing. So the bundle ships image files, drawn here (no one's photographs), and what the encoder
made of them where it was exported.

    golden/0.jpg ... 3.png   golden/vectors.safetensors: a tensor (4, D) for each precision
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image

from btpipe import artifact, neighbours, runtime
from btpipe.data.index import build
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.eval_loader import evaluation_batches
from btpipe.errors import MachineError, NumericsError
from btpipe.export import contract
from btpipe.export.contract import MODELS, Precision, Preprocessing
from btpipe.export.session import Device, Session

FOLDER = "golden"
VECTORS = "vectors.safetensors"
ORIENTATION = 0x0112
"""EXIF's tag; 6: to be turned by a quarter."""
LEAST_COSINE = 0.999
"""Decoders and processors differ by less; a wrong resize, crop or order of colours by more."""
LEAST_COSINE_BF16 = 0.99
"""Products of eight bits of mantissa, compared with the vectors of float32."""


def write(folder: Path, preprocessing: Preprocessing, precisions: Sequence[Precision]) -> None:
    """Puts the images into a bundle that is being made, and what its models make of them.

    Raises:
        MachineError: no space, or no permission.
    """
    golden_folder = folder / FOLDER
    golden_folder.mkdir()
    for name, content in _drawn().items():
        artifact.write_file(golden_folder / name, content)
    images = _pixels(golden_folder, preprocessing, None)
    expected: dict[str, NDArray[np.float32]] = {
        name: Session(folder / MODELS[name], device="cpu").run(images) for name in precisions
    }
    artifact.write_file(golden_folder / VECTORS, safetensors.numpy.save(expected))


def vectors(bundle: contract.Bundle) -> dict[str, NDArray[np.float32]]:
    """What each precision's model made of the images where it was exported: (4, D).

    Empty for a bundle from before there were golden images.
    """
    path = bundle.folder / FOLDER / VECTORS
    return safetensors.numpy.load_file(path) if path.is_file() else {}


def pixels(bundle: contract.Bundle, gpu: int | None) -> NDArray[np.uint8]:
    """The images in the evaluation view (4, S, S, 3), decoded and resized here."""
    return _pixels(bundle.folder / FOLDER, bundle.preprocessing, gpu)


def least_cosine(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The least cosine of two vectors of one image; not a number where one is of zeros."""
    with np.errstate(invalid="ignore"):
        products = neighbours.normalize(actual) * neighbours.normalize(expected)
    return float(products.sum(axis=1).min())


def compare(
    bundle: contract.Bundle,
    *,
    device: Device = "cpu",
    precisions: Sequence[Precision] | None = None,
) -> dict[str, float]:
    """The least cosine, for each precision, of the vectors here with those that were shipped.

    Of all models of the bundle, or of `precisions`. Files go through the decoder of `device`. Empty
    for a bundle from before there were golden images.

    Raises:
        MachineError: the device was asked for and cannot be used.
    """
    expected = vectors(bundle)
    if not expected:
        return {}
    images = pixels(bundle, 0 if runtime.resolve_device(device) == "cuda" else None)
    return {
        name: least_cosine(
            Session(bundle.model_of(name), device=device).run(images), expected[name]
        )
        for name in (bundle.precisions if precisions is None else precisions)
    }


def agrees(bundle: contract.Bundle, precision: Precision, *, device: Device) -> bool:
    """Whether this machine makes the shipped vectors in a precision; False where none were."""
    try:
        least = compare(bundle, device=device, precisions=(precision,))
    except MachineError:
        return False
    return least.get(precision, 0.0) >= LEAST_COSINE


def require(least: Mapping[str, float], bundle: contract.Bundle) -> None:
    """Returns where the least cosine of each precision is as near to 1 as decoders allow.

    Raises:
        NumericsError: this machine makes other vectors of the same files.
    """
    bounds = {name: LEAST_COSINE_BF16 if name == "bf16" else LEAST_COSINE for name in least}
    # Written so that NaN fails.
    failed = {name: value for name, value in least.items() if not value >= bounds[name]}
    if failed:
        measured = ", ".join(f"{name} {value:.6f}" for name, value in failed.items())
        if any(math.isnan(value) for value in failed.values()):
            fix = "export it anew: its weights are not finite, or make vectors of zeros"
            what = f"the vectors of its golden images have no cosine ({measured})"
            raise NumericsError(what, where=bundle.folder / FOLDER, fix=fix)
        raise NumericsError(
            f"other vectors than where it was exported: least cosine {measured}",
            where=bundle.folder / FOLDER,
            expected=" and ".join(f"{bounds[name]} or more" for name in failed),
            fix="compare the versions of nvidia-dali and onnxruntime with those that made it, or"
            " export it anew on this machine",
        )


def _drawn() -> dict[str, bytes]:
    """Four image files of several kinds, by name: the same wherever Pillow encodes alike."""
    random = np.random.default_rng(2048)
    files = {}
    for i, (width, height) in enumerate(((320, 240), (180, 300), (97, 64), (260, 260))):
        coarse = random.integers(0, 256, (7, 9, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        kind, options = "JPEG", {"quality": 90}
        exif = Image.Exif()
        if i == 1:
            exif[ORIENTATION] = 6
        if i == 2:
            image = image.convert("L")
        if i == 3:
            kind, options = "PNG", {}
        content = io.BytesIO()
        image.save(content, kind, exif=exif, **options)
        files[f"{i}.{'jpg' if kind == 'JPEG' else 'png'}"] = content.getvalue()
    return files


def _pixels(folder: Path, preprocessing: Preprocessing, gpu: int | None) -> NDArray[np.uint8]:
    """The images in the evaluation view, in the order of their names: (n, S, S, 3)."""
    index, _ = build(folder)
    rows = np.arange(len(index), dtype=np.int64)
    geometry = Geometry.for_size(preprocessing.size)
    batches = evaluation_batches(index, rows, geometry, batch_size=len(rows), threads=1, gpu=gpu)
    return np.concatenate([batch.pixels for batch in batches])
