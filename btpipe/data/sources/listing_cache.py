"""What an earlier index knows of files and containers that are as they were: they stay closed."""

import bisect
import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from btpipe.data.header import Header
from btpipe.data.sources.rows import SCHEMA, path_of, readable
from btpipe.data.sources.source import Source

Stamp = tuple[int, int]
"""Bytes and mtime_ns."""
StampedHeaders = dict[int, tuple[Stamp, Header]]
"""Position among some names to the stamp and the header that the file had."""


@dataclasses.dataclass(frozen=True)
class Recall:
    """Rows and sources of an earlier index, and the readable paths that it rejected."""

    table: pa.Table = dataclasses.field(default_factory=SCHEMA.empty_table)
    sources: tuple[Source, ...] = ()
    rejected: tuple[str, ...] = ()

    def container(self, source: Source) -> pa.Table | None:
        """The rows of a tar or parquet file of this very size and time, or None.

        None also where something in it was rejected: nothing here says what.
        """
        if source not in self.sources or not self._is_in_order or self._has_rejects(source):
            return None
        number = self.sources.index(source)
        start, stop = np.searchsorted(self._numbers, [number, number + 1]).tolist()
        rows = self.table.slice(start, stop - start)
        zeros = pa.array(np.zeros(len(rows), np.int32))
        return rows.set_column(SCHEMA.get_field_index("source"), SCHEMA.field("source"), zeros)

    def rows(self, source: Source, names: Sequence[bytes]) -> NDArray[np.int64]:
        """For each name in a folder or list the row that it had, or -1: (n,)."""
        key = (source.base, source.prefix)
        same = [
            number
            for number, previous in enumerate(self.sources)
            if not previous.is_container and (previous.base, previous.prefix) == key
        ]
        at = np.flatnonzero(np.isin(self._numbers, same))
        if not len(at) or not names:
            return np.full(len(names), -1, np.int64)
        table = self.table.select(["path", "path_bytes"]).take(pa.array(at))
        paths = pc.coalesce(table["path_bytes"], table["path"].cast(pa.binary()))
        requested = pa.array([path_of(source, name) for name in names], pa.binary())
        matches = pc.index_in(requested, value_set=paths.combine_chunks())
        return np.append(at, -1)[np.array(pc.fill_null(matches, len(at)), dtype=np.int64)]

    def headers(self, rows: NDArray[np.int64]) -> StampedHeaders:
        """Stamp and header of these rows by their position; without those that were only listed."""
        at = np.flatnonzero(rows >= 0)
        names = ("bytes", "mtime_ns", "format", "width", "height", "orientation", "mode")
        table = self.table.select(names).take(pa.array(rows[at]))
        columns = zip(*(table[name].to_pylist() for name in names), strict=True)
        return {
            position: ((size, mtime_ns), Header(*header))
            for position, (size, mtime_ns, *header) in zip(at.tolist(), columns, strict=True)
            if header[1] > 0 and header[-1] is not None
        }

    @functools.cached_property
    def _numbers(self) -> NDArray[np.int32]:
        return np.array(self.table["source"], dtype=np.int32)

    @functools.cached_property
    def _is_in_order(self) -> bool:
        return bool((np.diff(self._numbers) >= 0).all())

    @functools.cached_property
    def _rejected(self) -> list[str]:
        return sorted(self.rejected)

    def _has_rejects(self, source: Source) -> bool:
        """Whether the container or something in it was rejected."""
        prefix = readable(os.fsencode(source.prefix))
        whole = prefix.removesuffix("::").removesuffix("#")
        for path in (whole, prefix):
            position = bisect.bisect_left(self._rejected, path)
            candidates = self._rejected[position : position + 1]
            if candidates and (
                candidates[0] == path or (path == prefix and candidates[0].startswith(prefix))
            ):
                return True
        return False
