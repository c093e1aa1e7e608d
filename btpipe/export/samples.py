"""The real images that an export is made and judged with: some to calibrate on, others to judge."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from btpipe import runtime
from btpipe.data.index import Index
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.train_loader import evaluation_batches
from btpipe.errors import UsageError
from btpipe.events import Report
from btpipe.export.contract import Preprocessing

GATE_IMAGES = 256
CALIBRATION_IMAGES = 256
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images in the evaluation view: `pixels` (n, S, S, 3) to judge with, `calibration` (m, ...).

    No image is in both, by content. `labels` (n,) are numbers of classes, -1 where none is known.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    calibration: NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Read:
    """Images that could be read: their rows, pixels (n, S, S, 3) and files' digests."""

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    digests: list[str]


def choose(
    index: Index, preprocessing: Preprocessing, on_event: Report, *, calibrate: bool
) -> Samples:
    """Up to 256 images to judge with, and with `calibrate` as many others to calibrate on.

    Both lie evenly over the index; of a small one each gets half.

    Raises:
        UsageError: fewer images can be read than that needs.
    """
    count = GATE_IMAGES + (CALIBRATION_IMAGES if calibrate else 0)
    rows = spread(len(index), count)
    judging, calibrating = (rows[::2], rows[1::2]) if calibrate else (rows, rows[:0])
    judged = read(index, judging, preprocessing, on_event)
    others = read(index, calibrating, preprocessing, on_event)
    twins = set(judged.digests)
    pixels = others.pixels[[digest not in twins for digest in others.digests]]
    if len(judged.pixels) < 2 or (calibrate and len(pixels) == 0):
        expected = "two at least, to compare the exported model with the network on"
        raise UsageError(
            f"{len(judged.pixels) + len(pixels)} of {len(rows)} images can be used",
            where=index.root,
            expected=expected + (", and another one for int8" if calibrate else ""),
            fix="bring the images back, or name a folder with others: --images FOLDER",
        )
    return Samples(judged.pixels, _classes(index, judged.rows), pixels)


def spread(total: int, count: int) -> NDArray[np.int64]:
    """Up to `count` of `total` rows, evenly over all of them."""
    return np.unique(np.linspace(0, total - 1, count).round().astype(np.int64))


def read(index: Index, rows: NDArray[np.int64], prepared: Preprocessing, on_event: Report) -> Read:
    """These images in the evaluation view; those that cannot be read are reported and left out."""
    geometry = Geometry.for_size(prepared.size)
    empty = np.zeros((0, geometry.size, geometry.size, 3), np.uint8)
    good, parts, digests = [rows[:0]], [empty], []
    for batch in evaluation_batches(
        index, rows, geometry, batch_size=BATCH, threads=runtime.cores()
    ):
        good.append(batch.rows)
        parts.append(batch.pixels)
        digests += batch.digests
        for rejected in batch.rejected.values():
            on_event(dataclasses.replace(rejected, stage="export"))
    return Read(np.concatenate(good), np.concatenate(parts), digests)


def _classes(index: Index, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows' labels as numbers; -1 for none."""
    labels = index.table["label"].take(rows).to_pylist()
    names = {name: i for i, name in enumerate(sorted({name for name in labels if name}))}
    return np.array([names.get(name, -1) for name in labels], dtype=np.int64)
