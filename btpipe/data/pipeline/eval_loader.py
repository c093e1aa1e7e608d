"""The evaluation view of images, batch by batch. Nothing here needs torch."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from btpipe.data.index import Index
from btpipe.data.pipeline import dali_graphs, dali_runner, decode, prefetch
from btpipe.data.pipeline.decode import BatchDecoder, Encoded, Pixels
from btpipe.data.rejects import BadInputError
from btpipe.data.retry import reading_threads
from btpipe.events import Rejected


@dataclasses.dataclass(frozen=True)
class FileRead:
    """A file as it was when it was read: the sha256 of its content, its bytes and mtime_ns."""

    digest: str
    bytes: int
    mtime_ns: int


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Good rows, their pixels (n, S, S, 3) and their files.

    `sizes` (n, 2) are the upright [height, width] of the decoded images. Beside the good rows are
    the `rejected` ones, and the `cached_files`, of which the file's sha256 was enough.
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    files: list[FileRead]
    rejected: dict[int, Rejected]
    sizes: NDArray[np.int64]
    cached_files: dict[int, FileRead] = dataclasses.field(default_factory=dict)

    @property
    def digests(self) -> list[str]:
        """The sha256 of the good rows' files."""
        return [file.digest for file in self.files]


Decode = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Encoded bytes -> pixels (H, W, 3), or a BadInputError: `decode.decode`, or a stand-in."""
Mark = Callable[[Sequence[int], bool], AbstractContextManager[None]]
"""A context in which rows are in a decoder's hands; whether they are one file, decoded alone."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """What became of a row's file; without content its sha256 was enough."""

    row: int
    content: Encoded | Pixels | Rejected | None
    file: FileRead = FileRead("", -1, -1)


def _no_mark(_rows: Sequence[int], _alone: bool) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def evaluation_batches(
    index: Index,
    rows: NDArray[np.int64],
    geometry: dali_graphs.Geometry,
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
    geometry: dali_graphs.Geometry,
    *,
    batch_size: int,
    threads: int,
    gpu: int | None = None,
    decode_file: Decode = decode.decode,
    is_known: Callable[[int, str, int], bool] = lambda _row, _digest, _bytes: False,
    is_apart: Callable[[int], bool] = lambda _row: False,
    mark: Mark = _no_mark,
) -> Iterator[EvaluationBatch]:
    """`evaluation_batches` of tasks of rows that may become known by and by.

    Every batch has `batch_size` good rows but for the last one, whatever is bad or known and
    wherever tasks end. What is bad or known comes with the batch that follows, or in one without
    good rows where there are many.

    `decode_file` stands in for DALI's decoder. `is_known` says of a row, its file's sha256 and
    length whether its pixels are not needed, `is_apart` that a row must not be decoded in a GPU's
    batch.
    """
    decoder = None if gpu is None else decode.batch_decoder(gpu, threads)
    reader = _Reader(index, decoder, decode_file, is_known, is_apart, mark)
    packed = _Packed(geometry, batch_size)

    def build() -> Pipeline:
        return dali_graphs.evaluation_pipeline(
            geometry, batch_size=batch_size, threads=threads, gpu=gpu
        )

    with reading_threads(threads + 2) as pool:
        ahead = prefetch.read_ahead(enumerate(tasks), reader.read, reader.finish, pool)
        loads = packed.loads(files for _, _, files in ahead)
        for load, outputs in dali_runner.run(loads, build, decoder.stream if decoder else None):
            batch = packed.batches.pop(load.number)
            yield (
                dataclasses.replace(batch, pixels=dali_runner.copied(outputs[0]))
                if outputs
                else batch
            )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the files of rows, and decodes them: one by one on a CPU, in batches on a GPU."""

    index: Index
    decoder: BatchDecoder | None
    decode_file: Decode
    is_known: Callable[[int, str, int], bool]
    is_apart: Callable[[int], bool]
    mark: Mark

    def read(self, row: int) -> _Row:
        """A row's file, decoded where that is not done in a batch."""
        try:
            content, mtime_ns = self.index.read(row)
            file = FileRead(hashlib.sha256(content).hexdigest(), len(content), mtime_ns)
            if self.is_known(row, file.digest, file.bytes):
                return _Row(row, None, file)
            array = np.frombuffer(content, np.uint8)
            encoded = decode.parse(array) if self.decoder and not self.is_apart(row) else None
            if encoded is not None:
                return _Row(row, encoded, file)
            with self.mark((row,), True):
                return _Row(row, self.decode_file(array), file)
        except BadInputError as error:
            return _Row(row, self.index.reject(row, "decode", error))

    def finish(self, _rows: NDArray[np.int64], files: Sequence[_Row]) -> Sequence[_Row]:
        """Those of a task's rows together: what is left is decoded in a batch."""
        if self.decoder is None:
            return files
        pending = [(f.row, f.content) for f in files if isinstance(f.content, Encoded | np.ndarray)]
        with self.mark([row for row, content in pending if isinstance(content, Encoded)], False):
            decoded = self.decoder.decode([content for _, content in pending])
        rows = np.array([row for row, _ in pending], np.int64)
        images = dict(zip(rows.tolist(), self.index.with_rejects(rows, decoded), strict=True))
        return [dataclasses.replace(f, content=images.get(f.row, f.content)) for f in files]


class _Packed:
    """Good rows packed into loads of `batch_size`.

    `batches` keeps for each load's number the batch that it becomes, without its pixels.
    """

    def __init__(self, geometry: dali_graphs.Geometry, batch_size: int) -> None:
        self._geometry, self._batch_size = geometry, batch_size
        self._number = 0
        self._good: list[tuple[int, FileRead, Pixels]] = []
        self._rejected: dict[int, Rejected] = {}
        self._cached_files: dict[int, FileRead] = {}
        self.batches: dict[int, EvaluationBatch] = {}

    def loads(self, tasks: Iterator[Sequence[_Row]]) -> Iterator[dali_runner.DaliBatch]:
        """The loads of tasks whose files are decoded."""
        for files in tasks:
            for row in files:
                assert not isinstance(row.content, Encoded)
                if isinstance(row.content, Rejected):
                    self._rejected[row.row] = row.content
                elif row.content is None:
                    self._cached_files[row.row] = row.file
                else:
                    self._good.append((row.row, row.file, row.content))
                if len(self._good) == self._batch_size:
                    yield self._load(self._batch_size)
            if len(self._rejected) + len(self._cached_files) >= self._batch_size:
                yield self._load(0)
        if self._good or self._rejected or self._cached_files:
            yield self._load(len(self._good))

    def _load(self, count: int) -> dali_runner.DaliBatch:
        """The first `count` good rows, and all that is rejected or known."""
        number, good = self._number, self._good[:count]
        images = [image for _, _, image in good]
        rows, sizes = np.array([row for row, _, _ in good], np.int64), dali_runner.sizes_of(images)
        self.batches[number] = EvaluationBatch(
            rows=rows,
            pixels=np.zeros((0, self._geometry.size, self._geometry.size, 3), np.uint8),
            files=[file for _, file, _ in good],
            rejected=self._rejected,
            sizes=sizes,
            cached_files=self._cached_files,
        )
        self._good = self._good[count:]
        self._rejected, self._cached_files, self._number = {}, {}, number + 1
        inputs = dali_graphs.evaluation_inputs(self._geometry, sizes) if count else {}
        return dali_runner.DaliBatch(number, rows, images, inputs)
