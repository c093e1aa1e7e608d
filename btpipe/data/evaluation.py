"""The evaluation view of images, batch by batch. Nothing here needs torch."""

import collections
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from btpipe.data import decoding, reading, runs, views
from btpipe.data.index import Index


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Good rows, their pixels (n, S, S, 3) and their files' sha256; bad rows and why.

    `sizes` (n, 2) are the upright [height, width] of the decoded images. `known`: rows of which the
    digest was enough, and the digest.
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    digests: list[str]
    rejected: list[tuple[int, str]]
    sizes: NDArray[np.int64]
    known: list[tuple[int, str]] = dataclasses.field(default_factory=list)


_KNOWN = "known"
"""Stands for pixels that are not needed."""
Decode = Callable[[int, NDArray[np.uint8]], reading.Content]
"""(row, encoded bytes) -> pixels (H, W, 3), or for a GPU the bytes; or why there are none."""


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
    starts = range(0, len(rows), batch_size)
    return evaluation_stream(
        index,
        (rows[start : start + batch_size] for start in starts),
        geometry,
        batch_size=batch_size,
        threads=threads,
        gpu=gpu,
    )


def evaluation_stream(
    index: Index,
    tasks: Iterator[NDArray[np.int64]],
    geometry: views.Geometry,
    *,
    batch_size: int,
    threads: int,
    gpu: int | None = None,
    decode: Decode | None = None,
    is_known: Callable[[int, str, int], bool] = lambda _row, _digest, _bytes: False,
) -> Iterator[EvaluationBatch]:
    """`evaluation_batches` of tasks of at most `batch_size` rows that may become known by and by.

    `decode` stands in for DALI's decoder. `is_known` says of a row, its file's sha256 and length
    whether its pixels are not needed.
    """
    digests: dict[int, str] = {}
    rejected: dict[int, list[tuple[int, str]]] = collections.defaultdict(list)

    def plain(_: int, content: NDArray[np.uint8]) -> reading.Content:
        return content if gpu is not None else decoding.decode(content, None)

    def read(row: int) -> reading.Content:
        content = reading.read_file(index, row)
        if isinstance(content, str):
            return content
        digests[row] = hashlib.sha256(content.data).hexdigest()
        return (
            _KNOWN if is_known(row, digests[row], len(content)) else (decode or plain)(row, content)
        )

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
        for number, part, contents in reading.read_ahead(enumerate(tasks), read, pool):
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
            dropped = rejected.pop(load.number, [])
            known = [(row, digests.pop(row)) for row, reason in dropped if reason == _KNOWN]
            bad = [(row, reason) for row, reason in dropped if reason != _KNOWN]
            for row, _ in bad:
                digests.pop(row, None)
            yield EvaluationBatch(load.rows, pixels, names, bad, load.sizes, known)
