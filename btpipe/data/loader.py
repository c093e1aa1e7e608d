"""Batches: two views of every image for training, one for evaluation. `evaluation_batches` is torch-free."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from btpipe.data import order, params, runs, views
from btpipe.data.index import Index
from btpipe.errors import BudgetError, UsageError
from btpipe.events import FileRejected, Report
from btpipe.recipe import Recipe

if TYPE_CHECKING:
    import torch

READS_AHEAD = 2
"""Batches whose files are read while DALI works on `runs.RUNS_AHEAD` others."""
_READ_CHUNK_FILES = 16


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: index rows and two views, uint8 (n, H, W, 3)."""

    step: int
    images: NDArray[np.int64]
    view1: "torch.Tensor"
    view2: "torch.Tensor"


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Good rows with their pixels (n, S, S, 3) and the sha256 of each file; bad rows with the reason."""

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    digests: list[str]
    rejected: list[tuple[int, str]]


class TrainingLoader:
    """The batches of one rank from `start_step` on: what is drawn depends on seed and step alone.

    An image that cannot be read or decoded goes to `quarantine` (row to reason) and another takes
    its place, the same one in every run. Files are read by threads, DALI runs ahead.
    """

    def __init__(
        self,
        index: Index,
        recipe: Recipe,
        *,
        rank: int,
        world_size: int,
        start_step: int,
        device: "torch.device",
        report: Report,
        quarantine: dict[int, str],
    ) -> None:
        """Raises UsageError: fewer images than a batch, or a batch that the ranks cannot share."""
        size = recipe.data.batch_size
        if len(index) < size:
            found = f"{len(index)} images do not fill one batch of {size}"
            fix = "add images, or set data.batch_size"
            raise UsageError(found, where=index.root, expected=f"{size} or more", fix=fix)
        if size % world_size:
            found, fix = f"data.batch_size {size} over {world_size} ranks", "set data.batch_size"
            raise UsageError(found, expected=f"a multiple of {world_size}", fix=fix)
        self.index, self.recipe, self.start_step, self.device = index, recipe, start_step, device
        self.quarantine = quarantine
        self.steps_per_epoch = len(index) // size
        self.steps = recipe.optim.epochs * self.steps_per_epoch
        self._report, self._first, self._share = (
            report,
            rank * (size // world_size),
            size // world_size,
        )
        self._sizes = np.stack([index.heights, index.widths], axis=1).astype(np.int64)
        self._threads = recipe.data.threads or len(os.sched_getaffinity(0))
        self._gpu = None if device.type == "cpu" else device.index or 0
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads + 2, "btpipe-read")

    def __enter__(self) -> "TrainingLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the reading threads; what is in flight is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        """Raises BudgetError: more than `data.max_bad` of the images are unusable."""

        def build() -> runs.Pipeline:
            size, threads = self.recipe.data.image_size, self._threads
            return views.training_pipeline(
                self.recipe.views, size, batch_size=self._share, threads=threads, gpu=self._gpu
            )

        finished = runs.run(
            self._loads(),
            build,
            mend=self._mend,
            resize=self._redraw,
            pool=self._pool,
            gpu=self._gpu,
        )
        for load, (view1, view2) in finished:
            yield Batch(load.number, load.rows, self._tensor(view1), self._tensor(view2))

    def _tensor(self, output: runs.Output) -> "torch.Tensor":
        """DALI's output as a tensor of its own: DALI uses its buffers again."""
        import torch

        if self._gpu is None:
            return torch.from_numpy(_copied(output))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        dense = output.as_tensor()
        tensor = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
        feed_ndarray(dense, tensor, cuda_stream=torch.cuda.current_stream(self.device))
        return tensor

    def _loads(self) -> Iterator[runs.Load]:
        """The loads from `start_step` on, read ahead; what cannot be read is replaced here."""
        steps = range(self.start_step, self.steps)
        tasks = ((step, self._rows(step)) for step in steps)
        for step, rows, contents in _read_ahead(tasks, self._read, self._pool):
            bad = {i: content for i, content in enumerate(contents) if isinstance(content, str)}
            files = [np.zeros(0, np.uint8) if isinstance(c, str) else c for c in contents]
            load = runs.Load(step, rows, files, self._sizes[rows], {})
            yield self._mend(load, bad) if bad else self._drawn(load)

    def _epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def _rows(self, step: int) -> NDArray[np.int64]:
        """This rank's images of a step; those known to be bad are already replaced."""
        start = step % self.steps_per_epoch * self.recipe.data.batch_size + self._first
        count, epoch = len(self.index), self._epoch(step)
        rows = order.permutation(self.recipe.seed, epoch, count, start, start + self._share)
        for i in np.flatnonzero(np.isin(rows, list(self.quarantine))) if self.quarantine else ():
            rows[i] = self._substitute(epoch, int(rows[i]))
        return rows

    def _substitute(self, epoch: int, row: int) -> int:
        """The first replacement that is not known to be bad."""
        candidates = (
            order.replacement(self.recipe.seed, epoch, row, attempt, len(self.index))
            for attempt in itertools.count()
        )
        return next(candidate for candidate in candidates if candidate not in self.quarantine)

    def _read(self, row: int) -> NDArray[np.uint8] | str:
        return _read_file(self.index, row)

    def _drawn(self, load: runs.Load) -> runs.Load:
        epoch, seed = self._epoch(load.number), self.recipe.seed
        first, second = (
            params.draw(
                view,
                seed=seed,
                epoch=epoch,
                view_number=number,
                images=load.rows,
                widths=load.sizes[:, 1],
                heights=load.sizes[:, 0],
            )
            for number, view in enumerate(self.recipe.views)
        )
        return dataclasses.replace(load, inputs=views.training_inputs((first, second)))

    def _redraw(self, load: runs.Load, sizes: NDArray[np.int64]) -> runs.Load:
        """The index had another size: the crop is drawn again for the one that was decoded."""
        self._sizes[load.rows] = sizes
        return self._drawn(dataclasses.replace(load, sizes=sizes))

    def _mend(self, load: runs.Load, bad: dict[int, str]) -> runs.Load:
        """Quarantines the bad files and puts replacements, as far as they can be read, in their places."""
        planned = self._positions(load)
        rows, files = load.rows.copy(), list(load.files)
        for position, reason in bad.items():
            self._reject(int(rows[position]), reason)
            content: NDArray[np.uint8] | str = reason
            while isinstance(content, str):
                rows[position] = self._substitute(self._epoch(load.number), int(planned[position]))
                content = self._read(int(rows[position]))
                if isinstance(content, str):
                    self._reject(int(rows[position]), content)
            files[position] = content
        sizes = self._sizes[rows]
        return self._drawn(dataclasses.replace(load, rows=rows, files=files, sizes=sizes))

    def _positions(self, load: runs.Load) -> NDArray[np.int64]:
        """The images that the order alone names for a load."""
        start = load.number % self.steps_per_epoch * self.recipe.data.batch_size + self._first
        stop, epoch = start + self._share, self._epoch(load.number)
        return order.permutation(self.recipe.seed, epoch, len(self.index), start, stop)

    def _reject(self, row: int, reason: str) -> None:
        if row in self.quarantine:
            return
        self.quarantine[row] = reason
        path = self.index.table["path"][row].as_py()
        self._report(FileRejected(path, "decode", reason))
        allowed = self.recipe.data.max_bad * len(self.index) + 1e-9  # 0.29 * 100 is below 29
        if len(self.quarantine) > allowed or len(self.quarantine) == len(self.index):
            raise BudgetError(
                f"{len(self.quarantine)} of {len(self.index)} images cannot be used, {path} the last:"
                f" {reason}",
                where=self.index.root,
                expected=f"at most data.max_bad = {self.recipe.data.max_bad:g} of them",
                fix="remove or mend the files in quarantine.csv, or raise data.max_bad",
            )


def evaluation_batches(
    index: Index,
    rows: NDArray[np.int64],
    geometry: views.Geometry,
    *,
    batch_size: int,
    threads: int,
    gpu: int | None = None,
) -> Iterator[EvaluationBatch]:
    """The evaluation view of these rows, in their order; a row's pixels depend on its file alone."""
    digests: dict[int, str] = {}
    rejected: dict[int, list[tuple[int, str]]] = collections.defaultdict(list)

    def read(row: int) -> NDArray[np.uint8] | str:
        content = _read_file(index, row)
        digests[row] = "" if isinstance(content, str) else hashlib.sha256(content).hexdigest()
        return content

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
        for number, part, contents in _read_ahead(tasks, read, pool):
            sizes = np.stack([index.heights[part], index.widths[part]], axis=1).astype(np.int64)
            bad = {i: content for i, content in enumerate(contents) if isinstance(content, str)}
            files = [np.zeros(0, np.uint8) if isinstance(c, str) else c for c in contents]
            yield drop(runs.Load(number, part, files, sizes, {}), bad)

    def build() -> runs.Pipeline:
        return views.evaluation_pipeline(geometry, batch_size=batch_size, threads=threads, gpu=gpu)

    with concurrent.futures.ThreadPoolExecutor(threads + 2, "btpipe-read") as pool:
        for load, outputs in runs.run(loads(), build, mend=drop, resize=fit, pool=pool, gpu=gpu):
            empty = np.zeros((0, geometry.size, geometry.size, 3), np.uint8)
            pixels = _copied(outputs[0]) if outputs else empty
            names = [digests.pop(int(row)) for row in load.rows]
            yield EvaluationBatch(load.rows, pixels, names, rejected.pop(load.number, []))


def _copied(output: runs.Output) -> NDArray[np.uint8]:
    """An array of its own, (n, H, W, 3): samples are copied once, from where they lie."""
    count, shape = len(output), tuple(output[0].shape())
    array = np.empty((count, *shape), dtype=np.uint8)
    output = output.as_cpu()
    for i in range(count):
        array[i] = output[i]
    return array


def _read_file(index: Index, row: int) -> NDArray[np.uint8] | str:
    """The bytes of a row's file, or why there are none."""
    try:
        content = index.read_bytes(row)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return np.frombuffer(content, dtype=np.uint8) if content else "empty file"


Contents = list[NDArray[np.uint8] | str]


def _read_ahead(
    tasks: Iterator[tuple[int, NDArray[np.int64]]],
    read: Callable[[int], NDArray[np.uint8] | str],
    pool: concurrent.futures.Executor,
) -> Iterator[tuple[int, NDArray[np.int64], Contents]]:
    """(number, rows) -> (number, rows, content or reason of each), a few tasks ahead in threads."""

    def read_all(rows: NDArray[np.int64]) -> Contents:
        return [read(int(row)) for row in rows]

    ahead: collections.deque[
        tuple[int, NDArray[np.int64], list[concurrent.futures.Future[Contents]]]
    ] = collections.deque()
    while True:
        for number, rows in itertools.islice(tasks, READS_AHEAD + 1 - len(ahead)):
            chunks = range(0, len(rows), _READ_CHUNK_FILES)
            reads = [pool.submit(read_all, rows[i : i + _READ_CHUNK_FILES]) for i in chunks]
            ahead.append((number, rows, reads))
        if not ahead:
            return
        number, rows, reads = ahead.popleft()
        yield number, rows, [content for chunk in reads for content in chunk.result()]
