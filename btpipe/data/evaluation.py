"""The evaluation view of images, batch by batch. Nothing here needs torch."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from btpipe.data import decoding, reading, runs, views
from btpipe.data.decoding import BatchDecoder, Encoded, Pixels
from btpipe.data.index import Index
from btpipe.data.rejects import BadInputError
from btpipe.events import Rejected


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Good rows, their pixels (n, S, S, 3) and their files' sha256; the rejects of bad rows.

    `sizes` (n, 2) are the upright [height, width] of the decoded images. `known`: rows of which the
    digest was enough, and the digest.
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    digests: list[str]
    rejected: dict[int, Rejected]
    sizes: NDArray[np.int64]
    known: list[tuple[int, str]] = dataclasses.field(default_factory=list)


Decode = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Encoded bytes -> pixels (H, W, 3), or a BadInputError: `decoding.decode`, or a stand-in."""
Mark = Callable[[Sequence[int], bool], AbstractContextManager[None]]
"""A context in which rows are in a decoder's hands; whether they are one file, decoded alone."""


@dataclasses.dataclass(frozen=True)
class _Known:
    """Of a row whose pixels are not needed."""


_Content: TypeAlias = Pixels | Rejected | _Known


def _no_mark(_rows: Sequence[int], _alone: bool) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


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
    decode: Decode = decoding.decode,
    is_known: Callable[[int, str, int], bool] = lambda _row, _digest, _bytes: False,
    is_apart: Callable[[int], bool] = lambda _row: False,
    mark: Mark = _no_mark,
) -> Iterator[EvaluationBatch]:
    """`evaluation_batches` of tasks of rows that may become known by and by.

    Every batch has `batch_size` good rows but for the last one, whatever is bad or known and
    wherever tasks end. What is bad or known comes with the batch that follows, or in one without
    good rows where there are many.

    `decode` stands in for DALI's decoder. `is_known` says of a row, its file's sha256 and length
    whether its pixels are not needed, `is_apart` that a row must not be decoded in a GPU's batch.
    """
    decoder = None if gpu is None else decoding.batch_decoder(gpu, threads)
    reader = _Reader(index, decoder, decode, is_known, is_apart, mark)
    packed = _Packed(geometry, batch_size)

    def build() -> Pipeline:
        return views.evaluation_pipeline(geometry, batch_size=batch_size, threads=threads, gpu=gpu)

    with concurrent.futures.ThreadPoolExecutor(threads + 2, "btpipe-read") as pool:
        whole = reading.read_ahead(enumerate(tasks), reader.read, reader.finish, pool)
        loads = packed.loads((rows, contents) for _, rows, contents in whole)
        for load, outputs in runs.run(loads, build, decoder.stream if decoder else None):
            empty = np.zeros((0, geometry.size, geometry.size, 3), np.uint8)
            pixels = runs.copied(outputs[0]) if outputs else empty
            bad, known = packed.beside.pop(load.number)
            names = [reader.digests.pop(row) for row in load.rows.tolist()]
            named = [(row, reader.digests.pop(row)) for row in known]
            for row in bad:
                reader.digests.pop(row, None)
            yield EvaluationBatch(load.rows, pixels, names, bad, load.sizes, named)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """What becomes of a file: pixels, a reject, or nothing where it is known.

    `digests` keeps the sha256 of each file that could be read.
    """

    index: Index
    decoder: BatchDecoder | None
    decode: Decode
    is_known: Callable[[int, str, int], bool]
    is_apart: Callable[[int], bool]
    mark: Mark
    digests: dict[int, str] = dataclasses.field(default_factory=dict)

    def read(self, row: int) -> Encoded | _Content:
        """A row's file, decoded where that is not done in a batch."""
        try:
            content = self.index.read_bytes(row)
            self.digests[row] = digest = hashlib.sha256(content).hexdigest()
            if self.is_known(row, digest, len(content)):
                return _Known()
            file = np.frombuffer(content, np.uint8)
            encoded = decoding.parse(file) if self.decoder and not self.is_apart(row) else None
            if encoded is not None:
                return encoded
            with self.mark((row,), True):
                return self.decode(file)
        except BadInputError as error:
            return self.index.reject(row, "decode", error)

    def finish(
        self, rows: NDArray[np.int64], contents: Sequence[Encoded | _Content]
    ) -> list[_Content]:
        """Those of a task's rows together: what is left is decoded in a batch."""
        if self.decoder is None:
            return [content for content in contents if not isinstance(content, Encoded)]
        good = {i: content for i, content in enumerate(contents) if _is_image(content)}
        with self.mark([int(rows[i]) for i, c in good.items() if isinstance(c, Encoded)], False):
            images = dict(zip(good, self.decoder.decode(list(good.values())), strict=True))
        decoded = [images.get(i, content) for i, content in enumerate(contents)]
        return self.index.with_rejects(rows, decoded)


def _is_image(content: Encoded | _Content) -> TypeGuard[Encoded | NDArray[np.uint8]]:
    return not isinstance(content, Rejected | _Known)


class _Packed:
    """Good rows packed into loads of `batch_size`.

    `beside` keeps for each load's number the rejects of bad rows, and those that are known.
    """

    def __init__(self, geometry: views.Geometry, batch_size: int) -> None:
        self._geometry, self._batch_size = geometry, batch_size
        self._number = 0
        self._rows: list[int] = []
        self._images: list[Pixels] = []
        self._bad: dict[int, Rejected] = {}
        self._known: list[int] = []
        self.beside: dict[int, tuple[dict[int, Rejected], list[int]]] = {}

    def loads(
        self, tasks: Iterator[tuple[NDArray[np.int64], Sequence[_Content]]]
    ) -> Iterator[runs.Load]:
        for rows, contents in tasks:
            for row, content in zip(rows.tolist(), contents, strict=True):
                if isinstance(content, Rejected):
                    self._bad[row] = content
                elif isinstance(content, _Known):
                    self._known.append(row)
                else:
                    self._rows.append(row)
                    self._images.append(content)
                if len(self._rows) == self._batch_size:
                    yield self._load(self._batch_size)
            if len(self._bad) + len(self._known) >= self._batch_size:
                yield self._load(0)
        if self._rows or self._bad or self._known:
            yield self._load(len(self._rows))

    def _load(self, count: int) -> runs.Load:
        """The first `count` good rows, and all that is bad or known."""
        rows, images = np.array(self._rows[:count], np.int64), self._images[:count]
        self._rows, self._images = self._rows[count:], self._images[count:]
        self.beside[self._number] = self._bad, self._known
        self._bad, self._known, self._number = {}, [], self._number + 1
        inputs = views.evaluation_inputs(self._geometry, runs.sizes_of(images)) if count else {}
        return runs.Load(self._number - 1, rows, images, inputs)
