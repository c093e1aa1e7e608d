"""Files into memory, a few batches ahead in threads."""

import collections
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future

import numpy as np
from numpy.typing import NDArray

from btpipe.data.index import Index

TASKS_AHEAD = 2
"""Batches whose files are read while DALI works on others."""
_CHUNK_FILES = 16

Content = NDArray[np.uint8] | str
"""A file's bytes, or why there are none."""


def read_file(index: Index, row: int) -> Content:
    """The bytes of a row's file, or why there are none."""
    try:
        content = index.read_bytes(row)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return np.frombuffer(content, dtype=np.uint8) if content else "empty file"


def read_ahead(
    tasks: Iterator[tuple[int, NDArray[np.int64]]],
    read: Callable[[int], Content],
    pool: Executor,
) -> Iterator[tuple[int, NDArray[np.int64], list[Content]]]:
    """(number, rows) -> (number, rows, content or reason of each), a few tasks ahead in threads."""

    def read_all(rows: NDArray[np.int64]) -> list[Content]:
        return [read(int(row)) for row in rows]

    ahead: collections.deque[tuple[int, NDArray[np.int64], list[Future[list[Content]]]]] = (
        collections.deque()
    )
    while True:
        for number, rows in itertools.islice(tasks, TASKS_AHEAD + 1 - len(ahead)):
            chunks = range(0, len(rows), _CHUNK_FILES)
            reads = [pool.submit(read_all, rows[i : i + _CHUNK_FILES]) for i in chunks]
            ahead.append((number, rows, reads))
        if not ahead:
            return
        number, rows, reads = ahead.popleft()
        yield number, rows, [content for chunk in reads for content in chunk.result()]
