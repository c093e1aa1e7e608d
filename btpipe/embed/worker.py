"""A worker: a part's rows through reading, decoding, the network and onto the disk, at once."""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from btpipe import artifact, runtime
from btpipe.data.index import open_index
from btpipe.data.pipeline import decode
from btpipe.data.pipeline.eval_loader import EvaluationBatch, FileRead, evaluation_stream
from btpipe.embed import endings, table, work_folder
from btpipe.embed.encoder import Encoder
from btpipe.embed.messages import (
    Drain,
    InFlight,
    JobStarted,
    PartProgress,
    PartTask,
    PartWritten,
    Ready,
    TaskRequest,
    WorkerConfig,
)
from btpipe.embed.vector_cache import VectorCache
from btpipe.events import Rejected
from btpipe.export import golden


def work_for(connection: Connection, config: WorkerConfig, in_flight: InFlight) -> None:
    """Opens the bundle, says so, and makes parts until nobody asks for any.

    Raises:
        NumericsError: of the bundle's golden images it makes other vectors than were shipped.
        EOFError: the supervisor is gone.
        BtpipeError: whatever the job cannot go on with.
    """
    encoder = Encoder(config.encoder)
    golden.require(encoder.golden_cosine(), encoder.bundle)
    connection.send(Ready(encoder.digest, encoder.engine, encoder.precision, encoder.dimension))
    worker = _Worker(connection, config, encoder, connection.recv(), in_flight)
    while True:
        worker.make(connection.recv())


@dataclasses.dataclass
class _PartProgress:
    """What is known of a part so far."""

    task: PartTask
    rows: list[NDArray[np.int64]] = dataclasses.field(default_factory=list)
    sizes: list[NDArray[np.int64]] = dataclasses.field(default_factory=list)
    files: list[FileRead] = dataclasses.field(default_factory=list)
    vectors: list[NDArray[np.float32]] = dataclasses.field(default_factory=list)
    rejects: dict[int, Rejected] = dataclasses.field(default_factory=dict)
    reused: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether every input of the part is a row or a reject."""
        seen = sum(map(len, self.rows)) + len(self.rejects)
        return seen == self.task.inputs


class _Worker:
    """One process's share of a job whose plan is frozen."""

    def __init__(
        self,
        connection: Connection,
        config: WorkerConfig,
        encoder: Encoder,
        job: JobStarted,
        in_flight: InFlight,
    ) -> None:
        self._connection, self._encoder = connection, encoder
        self._folder, self._footer = job.folder, job.footer
        self._index = open_index(job.folder / work_folder.INDEX)
        self._cache = VectorCache(job.folder, job.footer)
        self._reused: dict[int, NDArray[np.float32]] = {}  # vectors of rows that are read ahead
        self._bytes = self._index.table["bytes"]
        self._batch_size = job.batch_size or encoder.batch_size
        self._in_flight, self._decoders, self._apart = in_flight, _Decoders(), set[int]()
        self._decode = config.decode or decode.decode
        self._threads = config.encoder.threads or runtime.cores()
        self._parts: collections.deque[_PartProgress] = collections.deque()
        self._sending = threading.Lock()

    def make(self, first: PartTask | Drain) -> None:
        """Makes parts until a `Drain`; reading runs ahead into the next part, writing lags."""
        if isinstance(first, Drain):
            return
        batches = evaluation_stream(
            self._index,
            self._tasks(first),
            self._encoder.geometry,
            # A part is the most that a kill can cost.
            batch_size=min(self._batch_size, first.inputs),
            threads=self._threads,
            gpu=self._encoder.gpu,
            decode_file=self._decode,
            is_known=self._is_known,
            is_apart=self._apart.__contains__,
            mark=self._mark,
        )
        writing: Future[None] | None = None
        clock = _Clock()
        with ThreadPoolExecutor(1, "btpipe-write") as pool:
            for batch, vectors in self._encoder.stream(clock.watch(batches), self._batch_size):
                self._add(batch, vectors)
                self._send(PartProgress(_count(batch), clock.taken()))
                for part in self._complete():
                    if writing is not None:
                        writing.result()
                    writing = pool.submit(self._write, part)
            for part in self._complete():  # those without a row
                if writing is not None:
                    writing.result()
                writing = pool.submit(self._write, part)
            if writing is not None:
                writing.result()
        assert not self._parts, "every row of a part is embedded or rejected"

    def _tasks(self, first: PartTask) -> Iterator[NDArray[np.int64]]:
        """The rows of the parts that are asked for, batch by batch, until a `Drain`."""
        task: PartTask | Drain = first
        while isinstance(task, PartTask):
            self._parts.append(_PartProgress(task, rejects=dict(task.excluded)))
            self._apart |= task.apart
            rows = task.rows
            for start in range(0, len(rows), self._batch_size):
                yield rows[start : start + self._batch_size]
            self._send(TaskRequest())
            task = self._connection.recv()

    def _complete(self) -> Iterator[_PartProgress]:
        """The parts in front of which every input is a row or a reject; they are made."""
        while self._parts and self._parts[0].is_complete:
            yield self._parts.popleft()

    @contextlib.contextmanager
    def _mark(self, rows: Sequence[int], is_alone: bool) -> Iterator[None]:
        """Shows the supervisor which rows are in a decoder's hands; one file's time is limited."""
        with self._decoders.at_work(alone=not self._apart.isdisjoint(rows)):
            slots = [self._in_flight.enter(row, timed=is_alone) for row in rows]
            try:
                yield
            finally:
                for slot in slots:
                    self._in_flight.leave(slot)

    def _is_known(self, row: int, digest: str, count: int) -> bool:
        """Whether the vector is known; a file that is not as listed is decoded for its size."""
        vector = self._cache.find(digest) if count == self._bytes[row].as_py() else None
        if vector is None or not np.isfinite(vector).all():
            return False
        self._reused[row] = vector
        return True

    def _add(self, batch: EvaluationBatch, vectors: NDArray[np.float32]) -> None:
        """Puts the rows of a batch into their parts; a vector that is not finite is a reject."""
        finite = np.isfinite(table.stored(self._footer, vectors)).all(axis=1)
        for part in self._parts:
            inside = range(part.task.first, part.task.end)
            is_inside = (batch.rows >= inside.start) & (batch.rows < inside.stop)
            good = np.flatnonzero(is_inside & finite)
            for i in np.flatnonzero(is_inside & ~finite):
                row, error = int(batch.rows[i]), endings.not_finite(self._footer, vectors[i])
                part.rejects[row] = self._index.reject(row, endings.ENCODE, error)
            cached_files = {row: file for row, file in batch.cached_files.items() if row in inside}
            rows = np.fromiter(cached_files, np.int64)
            part.rows += [batch.rows[good], rows]
            listed = np.stack([self._index.heights[rows], self._index.widths[rows]], axis=1)
            part.sizes += [batch.sizes[good], listed.astype(np.int64)]
            part.files += [batch.files[i] for i in good]
            part.files += cached_files.values()
            part.vectors += [vectors[good], *(self._reused.pop(row)[None] for row in cached_files)]
            part.rejects |= {row: why for row, why in batch.rejected.items() if row in inside}
            part.reused += len(cached_files)

    def _write(self, part: _PartProgress) -> None:
        """Writes a part and says so."""
        number, folder = part.task.part, self._folder
        rows = np.concatenate([np.zeros(0, np.int64), *part.rows])
        order = np.argsort(rows)
        rows, vectors = rows[order], np.concatenate([self._no_vectors(), *part.vectors])[order]
        sizes = np.concatenate([np.zeros((0, 2), np.int64), *part.sizes])[order]
        listed = self._index.table.take(rows)
        changed = np.flatnonzero(
            (sizes[:, 0] != np.array(listed["height"])) | (sizes[:, 1] != np.array(listed["width"]))
        )
        files = [part.files[i] for i in order]
        listed = _as_read(listed, sizes, files)
        columns = table.rows(self._footer, listed, [file.digest for file in files], vectors)
        temporary = folder / f"part-{number:06d}.tmp"
        with artifact.disk_errors(folder):
            table.write(temporary, table.schema(self._footer), [columns])
            digest = artifact.file_digest(temporary)
        paths = self._index.table["path"]
        rejects = [part.rejects[row] for row in sorted(part.rejects)]
        names = tuple(str(paths[int(rows[i])].as_py()) for i in changed)
        self._send(
            PartWritten(
                number, temporary.name, digest, len(rows), part.reused, tuple(rejects), names
            )
        )

    def _no_vectors(self) -> NDArray[np.float32]:
        return np.zeros((0, self._encoder.dimension), np.float32)

    def _send(self, message: TaskRequest | PartProgress | PartWritten) -> None:
        with self._sending:
            self._connection.send(message)


class _Decoders:
    """Lets decoders work side by side, or one of them alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at_work, self._is_reserved = 0, False

    @contextlib.contextmanager
    def at_work(self, *, alone: bool) -> Iterator[None]:
        """Waits until a decoder may work, and has the others wait where it is to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_reserved)
            self._is_reserved = alone
            self._changed.wait_for(lambda: not alone or not self._at_work)
            self._at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._at_work -= 1
                self._is_reserved &= not alone
                self._changed.notify_all()


class _Clock:
    """Measures how long batches are waited for."""

    def __init__(self) -> None:
        self._waited = 0.0

    def watch(self, batches: Iterator[EvaluationBatch]) -> Iterator[EvaluationBatch]:
        """The same batches."""
        start = time.monotonic()
        for batch in batches:
            self._waited += time.monotonic() - start
            yield batch
            start = time.monotonic()

    def taken(self) -> float:
        """Seconds waited since it was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited


def _count(batch: EvaluationBatch) -> int:
    """Inputs that a batch decides."""
    return len(batch.rows) + len(batch.cached_files) + len(batch.rejected)


def _as_read(listed: pa.Table, sizes: NDArray[np.int64], files: Sequence[FileRead]) -> pa.Table:
    """Rows of an index with the [height, width] (n, 2) that were decoded, and the files' stamps."""
    columns = {
        "width": sizes[:, 1],
        "height": sizes[:, 0],
        "bytes": np.array([file.bytes for file in files], np.int64),
        "mtime_ns": np.array([file.mtime_ns for file in files], np.int64),
    }
    for name, values in columns.items():
        at = listed.schema.get_field_index(name)
        field = listed.schema.field(name)
        listed = listed.set_column(at, field, pa.array(values).cast(field.type))
    return listed
