"""Exact nearest neighbours among many vectors of length 1, a block of similarities at a time.

Vectors are float16 and may be mapped from a file; similarities are float32 cosines of what is in
it, so a vector's with itself is 1 within 1e-3. What is in memory is a few blocks.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from btpipe import neighbours

Half = NDArray[np.float16]
OnBlock = Callable[[int, int], None]
"""Called with the blocks done and in all."""

ROWS = 2048
"""A block of similarities is 16 MB: it is still in the cache when it is looked through."""
SCAN_ROWS = 1024
"""2 MB at D 512: rows that one query is compared with at a time."""
DENSE = 1 / 8
"""Share of a block's entries from which on sorting all of it is faster than picking."""

_EXPONENTS = np.float32(2.0**112)
_KEEP = np.int32(-0x70000001)


def no_progress(_done: int, _total: int) -> None:
    """An `OnBlock` that does nothing."""


def widen(vectors: Half) -> NDArray[np.float32]:
    """float16 (n, D) as float32, exactly, where no value is above 1; 7 times faster than a cast.

    The bits move to float32's places, and the product makes up for the exponents' other origin.
    """
    bits = np.ascontiguousarray(vectors).view(np.int16).astype(np.int32)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _KEEP, out=bits)  # without the copies of the sign
    wide = bits.view(np.float32)
    np.multiply(wide, _EXPONENTS, out=wide)
    return wide


def nearest(
    queries: NDArray[np.float32], base: Half, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The rows of `base` most like each query: (m, D), (n, D) -> (m, k) indices and cosines.

    Queries have length 1. Sorted by falling cosine, ties by the lower index; k is cut to n.
    """
    best = _Best(len(queries), min(k, len(base)))
    rows = max(1, min(SCAN_ROWS, neighbours.BLOCK_BYTES // (4 * max(1, len(queries)))))
    for start in range(0, len(base), rows):
        best.offer(0, _similarities(queries, widen(base[start : start + rows])), start)
    return best.indices, best.similarities


def _similarities(queries: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(m, D), (n, D) -> (m, n). For one query BLAS's threads wait for each other longer than they
    work: 1.2 s of CPU for a million rows of 512 on a busy machine, and 0.2 without them.
    """
    if len(queries) == 1:
        return np.asarray(np.einsum("nd,d->n", rows, queries[0])[None])
    return queries @ rows.T


def nearest_others(
    base: Half, k: int, on_progress: OnBlock = no_progress
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The other rows most like each row: (n, D) -> (n, k) indices and falling cosines.

    Each pair of rows is compared once. k is cut to n - 1; which of several equally near rows is
    taken is the same in every call.
    """
    best = _Best(len(base), max(0, min(k, len(base) - 1)))
    starts = range(0, len(base), ROWS)
    # First near the diagonal: then every row has a k-th best that most others fall short of.
    for start in starts:
        rows = widen(base[start : start + ROWS])
        cosines = rows @ rows.T
        np.fill_diagonal(cosines, -np.inf)
        best.offer(start, cosines, start)
    done, total = 0, len(starts) * (len(starts) - 1) // 2
    for start, other, cosines in upper(base):
        if start != other:
            best.offer(start, cosines, other)
            best.offer(other, cosines.T, start)
            done += 1
            on_progress(done, total)
    return best.indices, best.similarities


def upper(base: Half) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """(first row, first column, similarities) of the blocks on and above the diagonal."""
    for start in range(0, len(base), ROWS):
        rows = widen(base[start : start + ROWS])
        for other in range(start, len(base), ROWS):
            columns = rows if other == start else widen(base[other : other + ROWS])
            yield start, other, rows @ columns.T


class _Best:
    """The k best that each of n rows was offered so far, sorted."""

    def __init__(self, n: int, k: int) -> None:
        self.indices = np.full((n, k), -1, np.int64)
        self.similarities = np.full((n, k), -np.inf, np.float32)

    def offer(self, start: int, similarities: NDArray[np.float32], first: int) -> None:
        """Similarities (a, b) of the rows from `start` to the columns from `first`."""
        k = self.indices.shape[1]
        if k == 0:
            return
        stop = start + len(similarities)
        if np.isneginf(self.similarities[start:stop, -1]).any():
            columns, values = neighbours.largest(similarities, min(k, similarities.shape[1]))
            self._merge(np.arange(start, stop), columns + first, values)
            return
        mask = similarities > self.similarities[start:stop, -1, None]
        if np.count_nonzero(mask) > DENSE * mask.size:
            columns, values = neighbours.largest(
                np.ascontiguousarray(similarities), min(k, mask.shape[1])
            )
            self._merge(np.arange(start, stop), columns + first, values)
            return
        rows, columns = _places(mask)
        if not len(rows):
            return
        changed, where, counts = np.unique(rows, return_index=True, return_counts=True)
        columns_of = np.full((len(changed), int(counts.max())), -1, np.int64)
        values_of = np.full(columns_of.shape, -np.inf, np.float32)
        line = np.repeat(np.arange(len(changed)), counts)
        position = np.arange(len(rows)) - np.repeat(where, counts)
        columns_of[line, position] = columns + first
        values_of[line, position] = similarities[rows, columns]
        self._merge(changed + start, columns_of, values_of)

    def _merge(
        self, rows: NDArray[np.int64], indices: NDArray[np.int64], values: NDArray[np.float32]
    ) -> None:
        k = self.indices.shape[1]
        both = np.concatenate([self.similarities[rows], values], axis=1)
        named = np.concatenate([self.indices[rows], indices], axis=1)
        order, self.similarities[rows] = neighbours.largest(both, k)
        self.indices[rows] = np.take_along_axis(named, order, axis=1)


def _places(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows, columns) of what is true, by rows, found in the order that memory has."""
    if mask.flags.c_contiguous:
        rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
        return rows, columns
    columns, rows = np.divmod(np.flatnonzero(mask.T), mask.shape[0])
    order = np.argsort(rows, kind="stable")
    return rows[order], columns[order]
