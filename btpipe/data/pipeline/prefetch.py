"""Files into memory, a few batches ahead in threads."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

TASKS_AHEAD = 2
"""Batches whose files are read while DALI works on others."""
_CHUNK_FILES = 16

Read = TypeVar("Read")
Result = TypeVar("Result")


def read_ahead(
    tasks: Iterator[tuple[int, NDArray[np.int64]]],
    read: Callable[[int], Read],
    finish: Callable[[NDArray[np.int64], Sequence[Read]], Sequence[Result]],
    pool: Executor,
) -> Iterator[tuple[int, NDArray[np.int64], Sequence[Result]]]:
    """(number, rows) -> (number, rows, what was made of each row), a few tasks ahead in threads.

    `read` is called for each row in the threads of `pool`, `finish` for each task's rows together
    in a thread of its own, one task after the other.
    """

    def read_all(rows: NDArray[np.int64]) -> list[Read]:
        return [read(int(row)) for row in rows]

    def whole(rows: NDArray[np.int64], reads: list[Future[list[Read]]]) -> Sequence[Result]:
        return finish(rows, [content for chunk in reads for content in chunk.result()])

    ahead: collections.deque[tuple[int, NDArray[np.int64], Future[Sequence[Result]]]] = (
        collections.deque()
    )
    finishing = ThreadPoolExecutor(1, "btpipe-finish")
    try:
        while True:
            for number, rows in itertools.islice(tasks, TASKS_AHEAD + 1 - len(ahead)):
                chunks = range(0, len(rows), _CHUNK_FILES)
                reads = [pool.submit(read_all, rows[i : i + _CHUNK_FILES]) for i in chunks]
                ahead.append((number, rows, finishing.submit(whole, rows, reads)))
            if not ahead:
                return
            number, rows, future = ahead.popleft()
            yield number, rows, future.result()
    finally:
        finishing.shutdown(cancel_futures=True)
