"""Is the trained encoder worth it? Its vectors against what costs nothing: colours, pixels, chance.

Two judges name the classes of the test images from the training images: nearest neighbours, and a
linear classifier on the vectors. The untrained encoder is the network the run started from, with
its batch norm statistics measured on the training images, so that only the training makes the
difference. The colour histogram is of 8 x 8 x 8 colours in RGB (as Swain and Ballard, IJCV 7 (1991)
11-32, count colours in space), summing to 1; of its roots, so that the cosine is the Bhattacharyya
coefficient.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from btpipe import runtime
from btpipe.data.index import Index, build, open_index
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.train_loader import evaluation_batches
from btpipe.embed import job
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import UsageError
from btpipe.evaluate import knn, labelled, linear_probe
from btpipe.evaluate.knn import Accuracy
from btpipe.evaluate.labelled import Labelled, Labels
from btpipe.events import Event, Finished, Report, TextTable
from btpipe.export import bundle, verify
from btpipe.pretrain import folder

PIXELS = 64
BATCH = 64
COLOURS = 8
"""Steps of each colour channel in a histogram."""
COMPONENTS = 256
"""The linear classifier sees raw pixels by so many principal components: on 12,288 numbers an image
it would take longer than the rest of the comparison together."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What neighbours and a linear classifier make of one kind of vectors."""

    neighbours: Accuracy
    linear: linear_probe.LinearScore


@dataclasses.dataclass(frozen=True)
class Comparison(Event):
    """Accuracies of four kinds of vectors on the same test images, which `run` has not seen."""

    run: Path
    colours: Scores
    pixels: Scores
    untrained: Scores
    pretrained: Scores

    @property
    def gain(self) -> float:
        """How much the trained encoder's neighbours are above the best other row's, -1 to 1."""
        others = (self.colours, self.pixels, self.untrained)
        best = max(one.neighbours.top1 for one in others)
        return self.pretrained.neighbours.top1 - max(best, self.pretrained.neighbours.majority)

    def tables(self) -> list[TextTable]:
        """The comparison for people, in per cent."""
        named = (
            ("colour histogram", self.colours),
            (f"raw pixels, {PIXELS} x {PIXELS}", self.pixels),
            ("untrained encoder", self.untrained),
            ("pretrained encoder", self.pretrained),
        )
        rows = [
            (
                name,
                _percent(one.neighbours.top1),
                _interval(one.neighbours.low, one.neighbours.high),
                _percent(one.linear.top1),
                _interval(*one.linear.interval1),
            )
            for name, one in named
        ]
        one = self.pretrained.neighbours
        note = (
            f"top-1 of {one.n:,} test images in %, with 95 % intervals; neighbours: k = {one.k},"
            f" cosine, weighted (temperature 0.07); linear: logistic regression, of pixels on"
            f" {COMPONENTS} principal components"
        )
        columns = ("vectors", "neighbours", "interval", "linear", "interval")
        share = _percent(one.majority)
        majority = ("majority class", share, "", share, "")
        title = f"Accuracy on images that {self.run} has not seen"
        return [TextTable(title, columns, (majority, *rows), note)]


def compare(
    run: Path,
    test: Path,
    out: Path,
    on_event: Report,
    *,
    pretrained: Path | None = None,
    k: int = 20,
) -> Comparison:
    """Exports, embeds and judges a run's encoder and its untrained twin; keeps all of it in `out`.

    `test`: labelled images (a folder for each class) that the run was not trained on; the training
    images are those of the run's index. `pretrained`: the run's bundle, where there is one already.

    Raises:
        UsageError: no such run, or images without classes.
        RefusedError: `out` holds the comparison of other weights.
    """
    index = open_index(run / folder.INDEX)
    if any(label is None for label in index.labels):
        fix = "compare on a data set with a folder of images for each class"
        raise UsageError("training images without classes", where=index.root, fix=fix)
    quiet = _without_ends(on_event)
    colours, pixels = _baselines(index, build(test, quiet)[0], quiet, k)
    untrained = bundle.export_run(run, out / "untrained", quiet, untrained=True)
    pretrained = pretrained or bundle.export_run(run, out / "pretrained", quiet)
    judged, options = [], job.JobOptions(batch_size=BATCH)
    for name, path in (("untrained", untrained), ("pretrained", pretrained)):
        tables = out / f"{name}-train.parquet", out / f"{name}-test.parquet"
        for source, table in zip((run / folder.INDEX, test), tables, strict=True):
            job.embed(source, table, EncoderConfig(path), quiet, options)
        judged.append(_judge(*labelled.pair(*tables, Labels()), name, quiet, k))
    return Comparison(run, colours, pixels, *judged)


def _judge(train: Labelled, test: Labelled, name: str, on_event: Report, k: int) -> Scores:
    near = knn.accuracy(*train.numbered(train.names), *test.numbered(train.names), k)
    return Scores(near, linear_probe.score(train, test, Path(name), on_event))


def _baselines(train: Index, test: Index, on_event: Report, k: int) -> tuple[Scores, Scores]:
    """Colour histograms, and the pixels themselves less the training images' mean picture."""
    (train_pixels, train_colours), (test_pixels, test_colours) = _pictures(train), _pictures(test)
    colours = _judge(train_colours, test_colours, "colour histogram", on_event, k)
    mean = train_pixels.embeddings.mean(axis=0)
    train_pixels, test_pixels = (
        _with(one, one.embeddings - mean) for one in (train_pixels, test_pixels)
    )
    near = knn.accuracy(
        *train_pixels.numbered(train_pixels.names), *test_pixels.numbered(train_pixels.names), k
    )
    axes = _principal_axes(train_pixels.embeddings)
    train_pixels, test_pixels = (
        _with(one, one.embeddings @ axes) for one in (train_pixels, test_pixels)
    )
    score = linear_probe.score(train_pixels, test_pixels, Path("raw pixels"), on_event)
    return colours, Scores(near, score)


def _with(rows: Labelled, vectors: NDArray[np.floating]) -> Labelled:
    return dataclasses.replace(rows, embeddings=vectors)


def _principal_axes(centred: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, D) -> (D, r), r at most COMPONENTS: by random projections, arXiv 0909.4061."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        most = min(COMPONENTS, *centred.shape)
        _, _, axes = torch.svd_lowrank(torch.from_numpy(centred), q=most, niter=1)
    return np.asarray(axes.numpy(), dtype=np.float32)


def _pictures(index: Index) -> tuple[Labelled, Labelled]:
    """The images that decode as pixels (n, PIXELS * PIXELS * 3), 0 to 1, and as histograms."""
    all_rows = np.arange(len(index), dtype=np.int64)
    geometry = Geometry.for_size(PIXELS)
    flat, histograms, rows = [], [], list[int]()
    for batch in evaluation_batches(
        index, all_rows, geometry, batch_size=BATCH, threads=runtime.cores()
    ):
        flat.append(batch.pixels.reshape(len(batch.pixels), -1))
        histograms.append(root_histograms(batch.pixels))
        rows.extend(batch.rows.tolist())
    labels, paths = index.labels, index.table["path"].to_pylist()
    names, keys = [labels[row] or "" for row in rows], [paths[row] for row in rows]
    pixels = np.concatenate(flat) / np.float32(255)
    return (
        Labelled("", names, keys, pixels),
        Labelled("", names, keys, np.concatenate(histograms)),
    )


def root_histograms(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Roots of the shares of COLOURS^3 colours, (n, h, w, 3) -> (n, COLOURS^3), of length 1."""
    steps = pixels.reshape(len(pixels), -1, 3).astype(np.int64) * COLOURS // 256
    colours = steps @ np.array([COLOURS**2, COLOURS, 1])
    bins = COLOURS**3
    places = colours + bins * np.arange(len(pixels))[:, None]
    counts = np.bincount(places.ravel(), minlength=bins * len(pixels))
    shares = counts.reshape(-1, bins) / colours.shape[1]
    return np.asarray(np.sqrt(shares), dtype=np.float32)


def _without_ends(on_event: Report) -> Report:
    """Passes on everything but the last words of the parts: the comparison has its own."""

    def pass_on(event: Event) -> None:
        if not isinstance(event, Finished | verify.Gates):
            on_event(event)

    return pass_on


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(low: float, high: float) -> str:
    return f"{_percent(low)} to {_percent(high)}"
