"""The encoder judged while it trains: how many labelled images their nearest neighbours name."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from btpipe import events, neighbours, runtime
from btpipe.data.index import Index, build, open_index
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.train_loader import evaluation_batches
from btpipe.errors import UsageError
from btpipe.events import Report
from btpipe.pretrain import network
from btpipe.pretrain.run import TrainingRun
from btpipe.recipe import Recipe

INDEX = "knn.parquet"
"""The labelled images, in the run folder."""
NEIGHBOURS = 20
MOST_IMAGES = 20_000
"""Images that are embedded at most: at 2,048 numbers their comparison takes seconds."""
BATCH = 64
"""Images that pass through the encoder together."""


def labelled_images(recipe: Recipe, on_event: Report) -> Index | None:
    """What `health.knn` names, as an index; None where it names nothing.

    Raises:
        UsageError: no images there, images without a label, or only one class.
    """
    source = recipe.health.knn
    if not source:
        return None
    expected = (
        "images with labels of two classes or more: a folder for each (DIR/cat/1.jpg), a list or"
        " a table with a column `label`"
    )
    fix = "or train without judging: --set health.knn="
    try:
        index, _ = build(source, on_event)
    except UsageError as error:
        what = f"health.knn = {source!r}: {error.what}"
        raise UsageError(what, where=error.where, expected=expected, fix=fix) from error
    labels = index.labels
    if None in labels:
        what = f"health.knn: {index.table['path'][labels.index(None)].as_py()} has no label"
        raise UsageError(what, where=source, expected=expected, fix=fix)
    if len(set(labels)) < 2:
        what = f"health.knn: {labels[0]!r} is the only class"
        raise UsageError(what, where=source, expected=expected, fix=fix)
    return index


class Judge:
    """Judges the encoder of a run by the labelled images of its folder; on one rank, alone.

    The training's network is not touched: a twin that shares its tensors embeds, in evaluation
    mode, uncompiled, and without a graph.
    """

    def __init__(self, run: TrainingRun, stopping: Callable[[], bool]) -> None:
        self._run, self._stopping = run, stopping
        self._images = open_index(run.folder / INDEX)
        self._rows, self._labels = judged(self._images)
        self._reported: set[int] = set()

    def judge(self) -> None:
        """Reports the leave-one-out accuracy of the present weights; nothing when asked to stop."""
        started = time.perf_counter()
        rows, vectors = self._embed()
        if self._stopping() or len(rows) < 2:
            return
        accuracy = leave_one_out_accuracy(vectors, self._labels[rows])
        run = self._run
        run.on_event(
            events.KnnJudged(
                step=run.state.step,
                epoch=run.state.step / run.steps_per_epoch,
                accuracy=accuracy,
                images=len(rows),
                neighbours=min(NEIGHBOURS, len(rows) - 1),
                seconds=time.perf_counter() - started,
            )
        )

    def _embed(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The readable rows and their vectors: (n,), (n, F)."""
        run, recipe = self._run, self._run.recipe
        encoder, device = evaluation_twin(run), run.runtime.device
        dtype = next(encoder.parameters()).dtype
        rows: list[NDArray[np.int64]] = []
        vectors: list[NDArray[np.float32]] = []
        batches = evaluation_batches(
            self._images,
            self._rows,
            Geometry.for_size(recipe.data.image_size),
            batch_size=BATCH,
            threads=recipe.data.threads or runtime.cores(),
            gpu=device.index if device.type == "cuda" else None,
        )
        for batch in batches:
            self._report_rejects(batch.rejected)
            if self._stopping():
                break
            pixels = torch.from_numpy(batch.pixels).to(device)
            with torch.no_grad(), run.core.autocast():
                features = encoder(network.normalise(pixels, dtype))
            rows.append(batch.rows)
            vectors.append(features.float().cpu().numpy())
        empty = np.zeros((0, network.features(recipe.network)), np.float32)
        return np.concatenate([self._rows[:0], *rows]), np.concatenate([empty, *vectors])

    def _report_rejects(self, rejected: Mapping[int, events.Rejected]) -> None:
        """Names an unreadable image once."""
        for row in rejected.keys() - self._reported:
            self._reported.add(row)
            self._run.on_event(dataclasses.replace(rejected[row], stage="knn"))


def judged(images: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of an index that are judged (m,), and the class of every row (n,)."""
    count = len(images)
    chosen = min(count, MOST_IMAGES)
    rows = np.arange(chosen, dtype=np.int64) * count // chosen
    names = images.labels
    numbers = {name: i for i, name in enumerate(sorted({name for name in names if name}))}
    return rows, np.array([numbers[name] for name in names if name], dtype=np.int64)


def evaluation_twin(run: TrainingRun) -> nn.Module:
    """The encoder with the present tensors, shared, in evaluation mode."""
    with torch.device("meta"):  # nothing is drawn: the training's random numbers stay as they are
        twin: nn.Module = network.encoder(run.recipe.network)
    twin.load_state_dict(run.core.network.encoder.state_dict(), assign=True)
    return twin.eval()


def leave_one_out_accuracy(vectors: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Share of rows whose class their `NEIGHBOURS` others name: (n, D), (n,) -> 0 to 1."""
    indices, similarities = neighbours.leave_one_out(vectors, NEIGHBOURS)
    scores = neighbours.vote(indices, similarities, labels, int(labels.max()) + 1)
    return float(np.mean(scores.argmax(axis=1) == labels))
