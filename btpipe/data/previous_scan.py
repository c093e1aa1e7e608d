"""What an earlier scan knows of files that are as they were: same path, bytes and mtime."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from btpipe.data import findings, rejects
from btpipe.data.findings import ImageFinding
from btpipe.data.index import SCHEMA, Index, open_index
from btpipe.data.sources.listing_cache import Recall
from btpipe.events import Rejected

_KNOWN = ("width", "height", "orientation", "format", "mode", "digest")


@dataclasses.dataclass(frozen=True)
class PreviousScan:
    """An earlier scan's index, what it rejected, and what it found."""

    index: Index | None = None
    rejects: tuple[Rejected, ...] = ()
    findings: tuple[ImageFinding, ...] = ()

    @property
    def recall(self) -> Recall:
        """What a listing may take from here instead of opening files again."""
        if self.index is None:
            return Recall()
        paths = tuple(reject.path for reject in self.rejects)
        return dataclasses.replace(self.index.recall, rejected=paths)

    def rows(self, index: Index) -> NDArray[np.int64]:
        """For each row of `index`, the row here of the same unchanged file, or -1: (n,)."""
        missing = np.full(len(index), -1, np.int64)
        if self.index is None or not len(self.index):
            return missing
        at = pc.index_in(_identity(index), value_set=_identity(self.index))
        return np.array(at.fill_null(-1), dtype=np.int64)

    def complete(self, table: pa.Table, at: NDArray[np.int64]) -> pa.Table:
        """The table with what is known of its rows, which are the rows `at` here, -1 for none."""
        if self.index is None or not (at >= 0).any():
            return table
        previous = self.index.table.take(pa.array(at, mask=at < 0))
        was_read = pc.fill_null(pc.greater(previous["width"], 0), fill_value=False)
        for name in _KNOWN:
            is_valid = pc.is_valid(previous["digest"]) if name == "digest" else was_read
            values = pc.if_else(is_valid, previous[name], table[name])
            table = table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), values)
        return table

    def flat(self, index: Index, at: NDArray[np.int64]) -> set[int]:
        """Rows of `index` that are as they were, and of one colour."""
        flat = pa.array([f.path for f in self.findings if f.kind == findings.FLAT], pa.string())
        of_one = np.array(pc.is_in(index.table["path"], flat), dtype=bool)
        return set(np.flatnonzero(of_one & (at >= 0)).tolist())

    def bad(self, index: Index) -> dict[int, Rejected]:
        """Rows of `index` that were rejected with this very content."""
        rejects_by_stamp = {
            (r.path, r.bytes, r.mtime_ns): r for r in self.rejects if r.mtime_ns >= 0
        }
        paths = pa.array([reject.path for reject in rejects_by_stamp.values()], pa.string())
        rows = np.flatnonzero(np.array(pc.is_in(index.table["path"], paths), dtype=bool))
        names = ["path", "bytes", "mtime_ns"]
        stamps = [tuple(row.values()) for row in index.table.select(names).take(rows).to_pylist()]
        stamped_rows = zip(rows.tolist(), stamps, strict=True)
        return {
            row: rejects_by_stamp[stamp] for row, stamp in stamped_rows if stamp in rejects_by_stamp
        }

    def gone(self, index: Index, rejected: Sequence[Rejected]) -> int:
        """How many of the inputs that were known are in neither `index` nor `rejected`."""
        current = [index.table["path"].combine_chunks(), _paths(rejected)]
        previous = [_paths(self.rejects)]
        if self.index is not None:
            previous.append(self.index.table["path"].combine_chunks())
        is_present = pc.is_in(pa.concat_arrays(previous), pa.concat_arrays(current))
        return len(is_present) - int(is_present.true_count)


def read(out: Path) -> PreviousScan:
    """What the scan that wrote `out` knows; nothing where there is none.

    Raises:
        IntegrityError: `out` is no index.
    """
    if not out.exists():
        return PreviousScan()
    rejected = tuple(rejects.read(rejects.path_beside(out)))
    return PreviousScan(open_index(out), rejected, tuple(findings.read(findings.path_beside(out))))


def _identity(index: Index) -> pa.Array:
    """(n,) strings: origin, path, bytes and mtime; equal for a file that is as it was."""
    table = index.table.combine_chunks()
    places = [
        "\0".join([s.place, *([str(s.bytes), str(s.mtime_ns)] if s.is_container else [])])
        for s in index.sources
    ] or [str(index.root)]
    origin = pa.array(places).take(pa.array(np.array(table["source"])))
    exact = pc.if_else(pc.is_valid(table["path_bytes"]), "exact", "")
    numbers = [pc.cast(table[name], pa.string()) for name in ("bytes", "mtime_ns")]
    joined = pc.binary_join_element_wise(origin, exact, table["path"], *numbers, "\0")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def _paths(rejected: Sequence[Rejected]) -> pa.Array:
    return pa.array([reject.path for reject in rejected], pa.string())
