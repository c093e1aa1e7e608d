"""Is the trained encoder worth it? Its vectors against an untrained one's and against raw pixels.

Nearest neighbours in the training images name the classes of the test images. The untrained encoder
is the network the run started from, with its batch norm statistics measured on the training images,
so that only the training makes the difference.
"""

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe import runtime
from btpipe.data import index as images
from btpipe.data.index import Index
from btpipe.data.loader import evaluation_batches
from btpipe.data.views import Geometry
from btpipe.embed import job
from btpipe.errors import UsageError
from btpipe.events import Event, Finished, Report, Tabled
from btpipe.explore import knn
from btpipe.explore.knn import Accuracy
from btpipe.export import bundle
from btpipe.pretrain import folder

PIXELS = 64
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Nearest-neighbour accuracy on the same test images of three kinds of vectors."""

    pixels: Accuracy
    untrained: Accuracy
    pretrained: Accuracy

    @property
    def gain(self) -> float:
        """How much the trained encoder is above the better of the two others, 0 to 1."""
        return self.pretrained.top1 - max(self.pixels.top1, self.untrained.top1)

    def table(self, title: str) -> Tabled:
        """The comparison for people."""
        named = (
            (f"raw pixels, {PIXELS} x {PIXELS}", self.pixels),
            ("untrained encoder", self.untrained),
            ("pretrained encoder", self.pretrained),
        )
        rows = [
            (name, _percent(a.top1), f"{_percent(a.low)} to {_percent(a.high)}")
            for name, a in named
        ]
        one = self.pretrained
        note = f"{one.n:,} test images, k = {one.k}, cosine, weighted (temperature 0.07)"
        majority = ("majority class", _percent(one.majority), "")
        return Tabled(title, ("vectors", "top-1 %", "95 % interval"), (majority, *rows), note)


def compare(
    run: Path, test: Path, out: Path, report: Report, *, pretrained: Path | None = None, k: int = 20
) -> Comparison:
    """Exports, embeds and judges a run's encoder and its untrained twin; keeps all of it in `out`.

    `test`: labelled images (a folder for each class) that the run was not trained on; the training
    images are those of the run's index. `pretrained`: the run's bundle, where there is one already.

    Raises:
        UsageError: no such run, or images without classes.
        RefusedError: `out` holds the comparison of other weights.
    """
    index = images.open_index(run / folder.INDEX)
    if any(label is None for label in index.labels):
        fix = "compare on a data set with a folder of images for each class"
        raise UsageError("training images without classes", where=index.root, fix=fix)
    quiet = _without_ends(report)
    pixels = _judge_pixels(index, images.build(test, quiet)[0], k)
    untrained = bundle.export_run(run, out / "untrained", quiet, untrained=True)
    pretrained = pretrained or bundle.export_run(run, out / "pretrained", quiet)
    judged = []
    for name, made in (("untrained", untrained), ("pretrained", pretrained)):
        tables = out / f"{name}-train.parquet", out / f"{name}-test.parquet"
        for source, table in zip((run / folder.INDEX, test), tables, strict=True):
            job.embed(source, table, made, quiet, batch_size=BATCH)
        judged.append(knn.evaluate(*tables, k=k))
    return Comparison(pixels, *judged)


def _judge_pixels(train: Index, test: Index, k: int) -> Accuracy:
    """Neighbours by the pixels themselves, less the training images' mean picture."""
    (known, known_names), (asked, asked_names) = _pixels(train), _pixels(test)
    names = {name: i for i, name in enumerate(sorted(set(known_names) | set(asked_names)))}
    mean = known.mean(axis=0)
    return knn.accuracy(
        known - mean,
        np.array([names[name] for name in known_names], dtype=np.int64),
        asked - mean,
        np.array([names[name] for name in asked_names], dtype=np.int64),
        k,
    )


def _pixels(index: Index) -> tuple[NDArray[np.floating], list[str]]:
    """(n, PIXELS * PIXELS * 3) in 0 to 1, and the n class names, of the images that decode."""
    rows = np.arange(len(index), dtype=np.int64)
    geometry = Geometry.for_size(PIXELS)
    batches = list(
        evaluation_batches(index, rows, geometry, batch_size=BATCH, threads=runtime.cores())
    )
    flat = np.concatenate([b.pixels.reshape(len(b.pixels), -1) for b in batches])
    labels = index.labels
    names = [labels[row] or "" for b in batches for row in b.rows]
    return flat / np.float32(255), names


def _without_ends(report: Report) -> Report:
    """Passes on everything but the last words of the parts: the comparison has its own."""

    def pass_on(event: Event) -> None:
        if not isinstance(event, Finished | Tabled):
            report(event)

    return pass_on


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
