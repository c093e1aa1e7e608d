"""Rejects of a finished table that are tried again: their rows are made, all others are kept."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from btpipe import artifact
from btpipe.data.index import Index
from btpipe.embed import outputs, table, vector_cache
from btpipe.events import Rejected


@dataclasses.dataclass(frozen=True)
class Retried:
    """Rows of an index to be made again, and the table `out` that has the others.

    `missing` (n,) are all rows that have no vector there, `rejects` those that stay without.
    """

    out: Path
    rows: frozenset[int]
    missing: NDArray[np.int64]
    rejects: tuple[Rejected, ...]

    def digest(self, plain: str) -> str:
        """The input of a plan that makes these rows only."""
        return artifact.json_digest([plain, *sorted(self.rows)])

    def within(self, rows: range) -> frozenset[int]:
        """Those to be made in a part of the rows."""
        return frozenset(row for row in self.rows if row in rows)


def find(out: Path, index: Index, rows: range, *, every: bool) -> Retried | None:
    """The rejects of a table of this very input that are not final, or `every` one.

    Machines recover; and what was gone is there again, because it is listed. None where the table
    is not what the index says, or is damaged: then all of it is to be made.
    """
    rejects = {bad.path: bad for bad in table.read_rejects(out)}
    paths = index.table["path"]
    is_missing = pc.is_in(paths, value_set=pa.array(list(rejects), pa.string()))
    missing = np.flatnonzero(np.array(is_missing, dtype=bool))
    missing = missing[(missing >= rows.start) & (missing < rows.stop)]
    found = [(int(row), rejects[paths[int(row)].as_py()]) for row in missing]
    chosen = frozenset(row for row, bad in found if every or bad.kind != "content")
    stay = tuple(bad for row, bad in found if row not in chosen)
    if chosen:
        present = np.setdiff1d(np.arange(rows.start, rows.stop), missing)
        held = vector_cache.paths_of(out)
        if held is None or not held.equals(paths.take(pa.array(present))):
            return None
    return Retried(out, chosen, missing, stay)


class Filler:
    """The parts of a table whose missing rows were made: they stand among those of the old one."""

    def __init__(self, retried: Retried, index: Index, footer: table.Footer) -> None:
        self._missing, self._index, self._schema = retried.missing, index, table.schema(footer)
        self._rows_by_path = {
            tuple(index.table[name][row].as_py() for name in ("path", "path_bytes")): row
            for row in retried.rows
        }
        self._batches = outputs.rows(retried.out)
        self._waiting = self._schema.empty_table()

    def filled(self, rows: range, made: Path | None) -> pa.Table:
        """The part of these rows of the index; `made` is the table of those that were made."""
        old_rows = np.setdiff1d(np.arange(rows.start, rows.stop), self._missing)
        old = self._take(len(old_rows))
        if made is None:
            return old
        new = table.read(made).cast(self._schema)
        keys = zip(new["path"].to_pylist(), new["path_bytes"].to_pylist(), strict=True)
        new_rows = np.array([self._rows_by_path[key] for key in keys], np.int64)
        order = np.argsort(np.concatenate([old_rows, new_rows]))
        return pa.concat_tables([old, new]).take(pa.array(order))

    def _take(self, count: int) -> pa.Table:
        """The next rows of the old table."""
        parts: Iterator[pa.RecordBatch] = self._batches
        while self._waiting.num_rows < count:
            more = pa.Table.from_batches([next(parts)]).cast(self._schema)
            self._waiting = pa.concat_tables([self._waiting, more])
        taken = self._waiting.slice(0, count)
        self._waiting = self._waiting.slice(count)
        return taken
