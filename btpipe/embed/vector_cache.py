"""Vectors that an earlier job made of the same content, with the same bundle and settings.

    known-digests.npy (n,) sorted   known-places.npy (n,) where each is, its checksum
    known-vectors.raw (n, D)

All three are mapped into memory, never read whole, by the process that looks something up.
"""

import dataclasses
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from btpipe import artifact
from btpipe.embed import outputs, table
from btpipe.events import Report, Warned

DIGESTS, PLACES, VECTORS = "known-digests.npy", "known-places.npy", "known-vectors.raw"
FILES = (DIGESTS, PLACES, VECTORS)
_PLACE = np.dtype([("row", "<i8"), ("check", "<u4")])


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What was found in earlier tables: rows that are whole, and those that are not.

    `dropped`: rows of a path that is not listed any more.
    """

    whole: int = 0
    damaged: int = 0
    dropped: int = 0


def gather(
    folder: Path,
    tables: Iterable[Path],
    footer: table.Footer,
    listed: pa.ChunkedArray,
    on_event: Report,
) -> Gathered:
    """Writes the vectors of finished tables and parts into a locked work folder.

    Raises:
        MachineError: no space.
    """
    batches: list[_Batch] = []
    damaged = 0
    with artifact.disk_errors(folder), (folder / VECTORS).open("wb") as file:
        for path in tables:
            lost = 0
            for batch in _batches(path):
                if isinstance(batch, int):
                    lost += batch
                else:
                    batches.append(_Batch.append_to(file, batch, footer))
            if lost:
                text = f"{path}: {lost} rows are damaged; they are computed again"
                on_event(Warned(text, {"rows": lost}))
            damaged += lost
        file.flush()
        os.fsync(file.fileno())
    names = np.concatenate([np.zeros(0, "S32"), *(batch.digests for batch in batches)])
    places = np.zeros(len(names), _PLACE)
    places["row"] = np.arange(len(names))
    places["check"] = np.concatenate([np.zeros(0, np.uint32), *(each.checks for each in batches)])
    order = np.argsort(names, kind="stable")
    with artifact.disk_errors(folder):
        np.save(folder / DIGESTS, names[order])
        np.save(folder / PLACES, places[order])
    paths = pa.chunked_array([batch.paths for batch in batches], pa.string())
    still = pc.is_in(paths, value_set=listed.combine_chunks())
    return Gathered(len(names), damaged, len(still) - (pc.sum(still).as_py() or 0))


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What is kept of some rows beside their vectors: sha256 of the files, checksums, paths."""

    digests: NDArray[np.bytes_]
    checks: NDArray[np.uint32]
    paths: pa.Array

    @classmethod
    def append_to(cls, file: BinaryIO, rows: pa.RecordBatch, footer: table.Footer) -> "_Batch":
        """Appends the vectors of the rows to the file."""
        flat = rows["embedding"].flatten().to_numpy(zero_copy_only=False)
        vectors = flat.astype(footer.dtype, copy=False).reshape(-1, footer.dimension)
        file.write(vectors.tobytes())
        digests = [bytes.fromhex(text) for text in rows["digest"].to_pylist()]
        checks = [zlib.crc32(vector.tobytes()) for vector in vectors]
        return cls(np.array(digests, "S32"), np.array(checks, np.uint32), rows["path"])


def _batches(path: Path) -> Iterator[pa.RecordBatch | int]:
    """The rows of a table, some at a time; of a row group that is damaged, how many it had."""
    if path.suffix != ".parquet" or path.is_dir():
        yield from outputs.rows(path)
        return
    with pq.ParquetFile(path.absolute(), page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            try:
                # Read whole before any of it is passed on.
                yield from file.read_row_group(group).to_batches()
            except (OSError, pa.ArrowException):
                yield int(file.metadata.row_group(group).num_rows)


def is_whole(path: Path) -> bool:
    """Whether every row of a table can be read as it was written."""
    return paths_of(path) is not None


def paths_of(path: Path) -> pa.ChunkedArray | None:
    """The paths of a table's rows; None where not every row can be read as it was written."""
    batches = list(_paths(path))
    if any(isinstance(batch, int) for batch in batches):
        return None
    return pa.chunked_array(batches, pa.string())


def _paths(path: Path) -> Iterator[pa.Array | int]:
    return (batch if isinstance(batch, int) else batch["path"] for batch in _batches(path))


def unlisted(tables: Iterable[Path], listed: pa.ChunkedArray) -> tuple[int, list[str]]:
    """How many rows the tables have, and the paths of those that are not listed any more."""
    parts = [part for path in tables for part in _paths(path)]
    paths = pa.chunked_array([part for part in parts if not isinstance(part, int)], pa.string())
    rows = len(paths) + sum(part for part in parts if isinstance(part, int))
    gone = pc.invert(pc.is_in(paths, value_set=listed.combine_chunks()))
    return rows, paths.filter(gone).to_pylist()


def forget(folder: Path) -> None:
    """Removes what `gather` wrote."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


class VectorCache:
    """What `gather` wrote; nothing where it did not."""

    def __init__(self, folder: Path, footer: table.Footer) -> None:
        self._digests = np.zeros(0, "S32")
        shape = (-1, footer.dimension)
        if not all((folder / name).exists() for name in FILES):
            return
        digests = np.load(folder / DIGESTS, mmap_mode="r")
        if len(digests):
            self._digests = digests
            self._places = np.load(folder / PLACES, mmap_mode="r")
            raw = np.memmap(folder / VECTORS, np.dtype(footer.dtype), mode="r")
            self._vectors = raw.reshape(shape)

    def find(self, digest: str) -> NDArray[np.float32] | None:
        """The vector `(D,)` of a file with this sha256; None where none is known, or it changed."""
        key = np.array(bytes.fromhex(digest), "S32")
        at = int(np.searchsorted(self._digests, key))
        if at == len(self._digests) or self._digests[at] != key:
            return None
        row, check = self._places[at]
        vector = np.array(self._vectors[row])
        return vector.astype(np.float32) if zlib.crc32(vector.tobytes()) == check else None
