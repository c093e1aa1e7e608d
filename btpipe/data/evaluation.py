"""The evaluation view of images, batch by batch. Nothing here needs torch."""

import collections
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from btpipe.data import decoding, reading, runs, views
from btpipe.data.index import Index


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Good rows, their pixels (n, S, S, 3) and their files' sha256; bad rows and why.

    `sizes` (n, 2) are the upright [height, width] of the decoded images.
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    digests: list[str]
    rejected: list[tuple[int, str]]
    sizes: NDArray[np.int64]


def evaluation_batches(
    index: Index,
    rows: NDArray[np.int64],
    geometry: views.Geometry,
    *,
    batch_size: int,
    threads: int,
    gpu: int | None = None,
) -> Iterator[EvaluationBatch]:
    """The evaluation view of these rows, in order; a row's pixels depend on its file alone."""
    digests: dict[int, str] = {}
    rejected: dict[int, list[tuple[int, str]]] = collections.defaultdict(list)

    def read(row: int) -> reading.Content:
        content = reading.read_file(index, row)
        if isinstance(content, str):
            digests[row] = ""
            return content
        digests[row] = hashlib.sha256(content.data).hexdigest()
        return content if gpu is not None else decoding.decode(content, None)

    def fit(load: runs.Load, sizes: NDArray[np.int64]) -> runs.Load:
        inputs = views.evaluation_inputs(geometry, sizes)
        return dataclasses.replace(load, sizes=sizes, inputs=inputs)

    def drop(load: runs.Load, bad: dict[int, str]) -> runs.Load:
        rejected[load.number] += [(int(load.rows[i]), reason) for i, reason in bad.items()]
        good = [i for i in range(len(load.rows)) if i not in bad]
        files = [load.files[i] for i in good]
        kept = dataclasses.replace(load, rows=load.rows[good], files=files)
        return fit(kept, load.sizes[good])

    def loads() -> Iterator[runs.Load]:
        starts = range(0, len(rows), batch_size)
        tasks = ((i, rows[start : start + batch_size]) for i, start in enumerate(starts))
        for number, part, contents in reading.read_ahead(tasks, read, pool):
            listed = np.stack([index.heights[part], index.widths[part]], axis=1).astype(np.int64)
            bad = {i: content for i, content in enumerate(contents) if isinstance(content, str)}
            files = [np.zeros(0, np.uint8) if isinstance(c, str) else c for c in contents]
            load = runs.Load(number, part, files, runs.sizes_of(files, listed), {})
            yield drop(load, bad)

    def build() -> Pipeline:
        return views.evaluation_pipeline(geometry, batch_size=batch_size, threads=threads, gpu=gpu)

    with concurrent.futures.ThreadPoolExecutor(threads + 2, "btpipe-read") as pool:
        for load, outputs in runs.run(loads(), build, mend=drop, resize=fit, pool=pool, gpu=gpu):
            empty = np.zeros((0, geometry.size, geometry.size, 3), np.uint8)
            pixels = runs.copied(outputs[0]) if outputs else empty
            names = [digests.pop(int(row)) for row in load.rows]
            bad = rejected.pop(load.number, [])
            yield EvaluationBatch(load.rows, pixels, names, bad, load.sizes)
