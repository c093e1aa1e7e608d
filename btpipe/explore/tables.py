"""A table of vectors, opened to be compared: vectors of length 1, float16, mapped from a file.

The first opening of a large table writes them once, as `X.parquet.unit-KEY.npy` beside it, or in
~/.cache/btpipe/vectors where that cannot be written to; the next ones map that file. KEY changes
with the table's size, time of change, first and last bytes, and older files of a table are removed.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import io
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from btpipe import artifact, neighbours
from btpipe.embed import arrays, outputs, table
from btpipe.errors import IntegrityError, UsageError
from btpipe.events import Note, Report
from btpipe.explore.blocks import Half

MEMORY_BYTES = 32 * 2**20
"""float16 vectors of a table up to here are not kept in a file: reading them takes a second."""
_KEY_BYTES = 65_536
_EMBEDDING = "embedding"


@dataclasses.dataclass(frozen=True)
class Vectors:
    """A table: `unit` are its vectors at length 1 (n, D); its other columns are read when asked."""

    path: Path
    footer: Mapping[str, str]
    unit: Half
    loaded: pa.Table | None = None

    def __len__(self) -> int:
        return len(self.unit)

    @functools.cached_property
    def rows(self) -> pa.Table:
        """Every column but the vectors."""
        return _others(self.path) if self.loaded is None else self.loaded

    def take(self, rows: NDArray[np.int64]) -> "Vectors":
        """The table of these rows, in memory."""
        kept = np.asarray(self.unit[rows])
        return dataclasses.replace(self, unit=kept, loaded=self.rows.take(pa.array(rows)))

    def column(self, name: str) -> list[str | None]:
        """A column as text; Nones where the table has none of that name."""
        if name not in self.rows.column_names:
            return [None] * len(self)
        return list(self.rows[name].cast(pa.string()).to_pylist())

    def cell(self, name: str, row: int) -> str | bytes | int | None:
        """One cell; of a large table only what lies around it is read."""
        part, position = (self.rows, row) if self._groups is None else self._groups.around(row)
        value: str | bytes | int | None = None
        if name in part.column_names:
            value = part[name][position].as_py()
        return value

    def text(self, name: str, row: int) -> str:
        """One cell as text, "" where there is none."""
        value = self.cell(name, row)
        return "" if value is None else str(value)

    @functools.cached_property
    def _groups(self) -> "_Groups | None":
        kind = outputs.kind_of(self.path)
        if (
            self.loaded is not None
            or kind not in ("parquet", "array")
            or len(self) <= table.ROW_GROUP_ROWS
        ):
            return None
        return _Groups(self.path if kind == "parquet" else arrays.ids_path(self.path))


class _Groups:
    """The row groups of a parquet file, each read when a row of it is asked for, and kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        metadata = pq.read_metadata(path.absolute())
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._stops = np.cumsum(counts)
        self._names = [n for n in pq.read_schema(path.absolute()).names if n != _EMBEDDING]
        self._kept: dict[int, pa.Table] = {}

    def around(self, row: int) -> tuple[pa.Table, int]:
        """The group that holds a row, and the row's position in it."""
        group = int(np.searchsorted(self._stops, row, side="right"))
        if group not in self._kept:
            with pq.ParquetFile(self._path.absolute(), page_checksum_verification=True) as file:
                self._kept[group] = file.read_row_group(group, columns=self._names)
        return self._kept[group], row - (int(self._stops[group - 1]) if group else 0)


def open_vectors(path: Path, on_event: Report) -> Vectors:
    """Opens a table that `btpipe embed` wrote, in any of its formats.

    Raises:
        UsageError: no such table, or no rows.
        IntegrityError: not a table of vectors, or one with a vector that is not finite.
        MachineError: no space for the float16 vectors.
    """
    footer = outputs.footer_of(path)
    if footer is None:
        raise UsageError("no such table of vectors", where=path, fix="make it: btpipe embed")
    count = outputs.count(path)
    if count == 0:
        raise UsageError("holds no vectors", where=path, fix="embed a folder with images")
    try:
        dimension = int(footer["btpipe.dimension"])
        shape = count, dimension
        if 2 * count * dimension <= MEMORY_BYTES:
            unit = np.concatenate(list(_unit(path, dimension)))
        else:
            unit = _mapped(path, shape, on_event)
        return Vectors(path, footer, unit)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise IntegrityError(f"cannot be read: {error}", where=path) from error


def _mapped(path: Path, shape: tuple[int, int], on_event: Report) -> Half:
    """The vectors from their file, which is written first where there is none of this table."""
    name = f"{path.name}.unit-{_key(path)}.npy"
    folders = (path.absolute().parent, Path.home() / ".cache" / "btpipe" / "vectors")
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            vectors: Half = np.load(folder / name, mmap_mode="r")
            if vectors.shape == shape and vectors.dtype == np.float16:
                return vectors
    writable = [folder for folder in folders if _is_writable(folder)]
    if not writable:
        fix = f"let one of these be written to: {', '.join(map(str, folders))}"
        raise UsageError("no place for the vectors in float16", where=path, fix=fix)
    folder = writable[0]
    for old in folder.glob(f"{glob.escape(path.name)}.unit-*.npy"):
        old.unlink(missing_ok=True)
    with artifact.disk_errors(folder / name):
        _write(path, folder / name, shape)
    on_event(Note(f"{folder / name}: the vectors in float16, for the next time; may be deleted"))
    return np.asarray(np.load(folder / name, mmap_mode="r"))


def _is_writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    return False


def _write(path: Path, to: Path, shape: tuple[int, int]) -> None:
    temporary = to.with_name(f"{to.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            header = {"shape": shape, "fortran_order": False, "descr": "<f2"}
            np.lib.format.write_array_header_1_0(file, header)
            for part in _unit(path, shape[1]):
                file.write(part.astype("<f2", copy=False).data)
        os.replace(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)


def _key(path: Path) -> str:
    """12 hex digits that change when the table does, from a few reads."""
    digest = hashlib.sha256(str(path.absolute()).encode())
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
            with file.open("rb") as content:
                digest.update(content.read(_KEY_BYTES))
                content.seek(max(0, status.st_size - _KEY_BYTES))
                digest.update(content.read())
    return digest.hexdigest()[:12]


def _unit(path: Path, dimension: int) -> Iterator[Half]:
    """The vectors at length 1, some rows at a time."""
    done = 0
    for batch in _batches(path):
        part = batch[_EMBEDDING].flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
        arrays.require_finite(part, path, done)
        yield neighbours.normalize(part).astype(np.float16)
        done += len(part)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The column of vectors; other columns are not read where the format lets them be."""
    if outputs.kind_of(path) != "parquet":
        yield from outputs.rows(path)
        return
    with pq.ParquetFile(path.absolute(), page_checksum_verification=True) as file:
        yield from file.iter_batches(batch_size=table.ROW_GROUP_ROWS, columns=[_EMBEDDING])


def _others(path: Path) -> pa.Table:
    """Every column but the vectors."""
    match outputs.kind_of(path):
        case "parquet":
            names = [name for name in pq.read_schema(path.absolute()).names if name != _EMBEDDING]
            return pq.read_table(path.absolute(), columns=names, page_checksum_verification=True)
        case "array":
            return table.read(arrays.ids_path(path))
        case _:
            batches = [batch.drop_columns([_EMBEDDING]) for batch in outputs.rows(path)]
            return pa.Table.from_batches(batches)


def write_list(out: Path, rows: pa.Table) -> None:
    """Writes a list of findings as .csv or .parquet, whole or not at all.

    Raises:
        UsageError: another ending.
        MachineError: no space, or no permission.
    """
    check_list(out)
    content = io.BytesIO()
    if out.suffix == ".csv":
        pc.write_csv(rows, content)
    else:
        pq.write_table(rows, content)
    artifact.write_file(out, content.getvalue())


def check_list(out: Path) -> None:
    """Passes a name that `write_list` can write to.

    Raises:
        UsageError: another ending.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise UsageError(f"--out {out}", expected="a name that ends in .csv or .parquet")


def list_path(vectors: Path, what: str) -> Path:
    """`X.parquet` -> `X.WHAT.csv`, beside the table."""
    return vectors.with_name(f"{vectors.name.removesuffix(vectors.suffix)}.{what}.csv")


def bundle_of(vectors: Vectors) -> str:
    """The digest of the bundle that made the vectors."""
    return vectors.footer.get(table.BUNDLE, "")


def distances(similarities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine distances, 1 - cosine; what rounding takes below 0 is 0."""
    return np.asarray(np.maximum(np.float32(1) - similarities, np.float32(0)), np.float32)
