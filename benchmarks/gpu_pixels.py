"""The stage of `benchmarks.gpu` that compares pixels: decoders and views, GPU against CPU."""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_loader import decoders
from benchmarks.stage import (
    Require,
    cores,
    device,
    files_of,
    gpu,
    index_of,
    judged,
    loader_of,
    print_result,
    recipe_of,
    synchronize,
)
from benchmarks.workspace import Workspace
from btpipe.data.pipeline import dali_graphs, decode
from btpipe.data.pipeline.eval_loader import evaluation_batches
from btpipe.data.pipeline.train_loader import LoaderSettings
from btpipe.data.rejects import BadInputError

DECODE_LEVELS, EVALUATION_LEVELS, VIEW_LEVELS = 0.5, 0.5, 1.5
"""Grey levels, mean over a set: decoders of a GPU round otherwise, views stretch colours."""
REPEATS = 6


def stage_pixels(workspace: Workspace) -> None:
    """Decoders, the evaluation view and the training views on the GPU against the CPU."""
    with judged() as require:
        _decoders(workspace, require)
        _evaluation_view(workspace, require)
        _training_views(workspace, require)


def _decoders(workspace: Workspace, require: Require) -> None:
    files = [*files_of(workspace.photos), *files_of(workspace.jpegs, 32)]
    parsed = [encoded for file in files if (encoded := decode.parse(file))]
    expected = [decode.decode(encoded.file) for encoded in parsed]
    print_result("files for a batch", count=len(parsed), of=len(files))
    for name, decoder in decoders():
        hashes = set()
        for turn in range(REPEATS):
            _keep_busy(20 * turn)
            images = [np.asarray(_on_host(image)) for image in decoder.decode(parsed)]
            hashes.add(hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest())
        synchronize()
        shapes = sum(a.shape != np.shape(b) for a, b in zip(images, expected, strict=True))
        pairs = [(a, b) for a, b in zip(images, expected, strict=True) if a.shape == np.shape(b)]
        errors = [_levels(a, b) for a, b in pairs]
        print_result(
            f"decode, {name}",
            mean=round(float(np.mean(errors)), 4),
            worst_file=round(max(errors), 3),
            other_shapes=shapes,
            different_results_of_6=len(hashes),
            rescued_by_the_cpu=decoder.rescued,
        )
        if name == "as btpipe":
            mean = float(np.mean(errors))
            require(shapes == 0, "decoded images of another shape")
            require(not decoder.rescued, f"{decoder.rescued} good files failed in a batch")
            require(mean <= DECODE_LEVELS, f"decoded images differ by {mean:.2f} levels")
            require(len(hashes) == 1, "the same files were decoded to different pixels")


def _keep_busy(products: int) -> None:
    """Gives the GPU, if there is one, other work at the same time."""
    if device().type == "cuda":
        matrix = torch.randn(2048, 2048, device=device())
        for _ in range(products):
            torch.mm(matrix, matrix)


def _on_host(image: decode.Pixels | BadInputError) -> object:
    assert not isinstance(image, BadInputError), image
    return image if isinstance(image, np.ndarray) else image.cpu()


def _levels(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


def _evaluation_view(workspace: Workspace, require: Require) -> None:
    index, geometry = index_of(workspace.photos), dali_graphs.Geometry.for_size(224)
    rows = np.arange(len(index))
    both = [
        np.concatenate(
            [
                batch.pixels
                for batch in evaluation_batches(
                    index, rows, geometry, batch_size=64, threads=cores(), gpu=on
                )
            ]
        )
        for on in (None, gpu())
    ]
    require(both[0].shape == both[1].shape, f"views of {both[0].shape} and {both[1].shape}")
    error = _levels(both[0], both[1])
    print_result("evaluation view, GPU against CPU", mean=round(error, 4))
    require(error <= EVALUATION_LEVELS, f"evaluation views differ by {error:.2f} levels")


def _training_views(workspace: Workspace, require: Require) -> None:
    index = index_of(workspace.photos)
    run_recipe = recipe_of(workspace, "imagenet-1gpu.toml", f"data.threads={cores()}")
    count = 8 if workspace.small else min(64, len(index))
    settings = LoaderSettings.sample(run_recipe, count, steps=1)
    batches = []
    for on in (torch.device("cpu"), device()):
        with loader_of(index, settings, on) as loader:
            batches.append(next(iter(loader)))
    require((batches[0].images == batches[1].images).all().item(), "batches of other images")
    for i in range(2):
        a, b = (batch.views[i].cpu().numpy() for batch in batches)
        each = np.abs(a.astype(np.int16) - b.astype(np.int16)).mean(axis=(1, 2, 3))
        print_result(
            f"training view {i}, GPU against CPU",
            mean=round(float(each.mean()), 4),
            worst_image=round(float(each.max()), 3),
            over_3_levels=int((each > 3).sum()),
            images=len(each),
        )
        require(each.mean() <= VIEW_LEVELS, f"view {i} differs by {each.mean():.2f} levels")
