"""What vectors are written as, by the ending of their name. Parts of a job are always parquet.

X.parquet      one table
X              a folder of tables, part-000000.parquet and so on
X.npy          the matrix (n, D); everything else of the rows in X.npy.ids.parquet
X.safetensors  the same, as a tensor `embedding` that carries the footer
X.lance        a Lance data set, where the package is installed

All are streamed: what is in memory does not grow with the number of rows.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from btpipe import artifact, output_path
from btpipe.embed import arrays, lance, table
from btpipe.errors import IntegrityError, UsageError

Kind = Literal["parquet", "folder", "array", "lance"]
ENDINGS: Mapping[str, Kind] = {
    ".parquet": "parquet",
    "": "folder",
    ".npy": "array",
    ".safetensors": "array",
    ".lance": "lance",
}

FILE_ROWS = 65_536
"""Rows of a file in a folder: 512 MB at D 2048 in float32."""


def kind_of(out: Path) -> Kind:
    """What is written under this name.

    Raises:
        UsageError: an ending that is not known, or one whose package is not installed.
    """
    kind = ENDINGS.get(out.suffix)
    if kind is None:
        raise UsageError(
            "not a name for a table",
            where=out,
            expected="X.parquet, X.npy, X.safetensors, X.lance, or a folder: X without an ending",
        )
    if kind == "lance":
        lance.require()
    return kind


def check(out: Path) -> None:
    """Passes a name that vectors can be written to.

    Raises:
        UsageError: as `kind_of`, or a folder under a file's name, or a file under a folder's.
        UsageError, MachineError: as `output_path.require_writable`.
    """
    output_path.require_writable(out)
    is_folder = kind_of(out) in ("folder", "lance")
    files = [table.rejects_path(out), *companions(out), *([] if is_folder else [out])]
    folders = [table.work_path(out), *([out] if is_folder else [])]
    output_path.require_writable(out, *files, *folders)
    taken = [(path, "folder") for path in files if path.is_dir()]
    taken += [(path, "file") for path in folders if path.exists() and not path.is_dir()]
    for path, kind in taken:
        what = f"not a name for a table: a {kind} of that name is there"
        raise UsageError(what, where=path, fix="choose another --out")


def companions(out: Path) -> tuple[Path, ...]:
    """What else is written with `out`."""
    return (arrays.ids_path(out),) if kind_of(out) == "array" else ()


def refuse_input(out: Path, inputs: Iterable[str]) -> None:
    """Raises UsageError where the table would take the place of what it is made from."""
    names = (out, table.rejects_path(out), *companions(out))
    outputs = {os.path.realpath(path) for path in names}
    if any(os.path.realpath(path) in outputs for path in inputs):
        raise UsageError(
            "is one of the inputs",
            where=out,
            expected="a table beside the images",
            fix="choose another --out, or name the inputs by a pattern that leaves it out",
        )


def write(out: Path, temporary: Path, footer: table.Footer, parts: Iterable[pa.Table]) -> None:
    """Streams parts to `temporary` in the format of the name `out`, and fsyncs it.

    `take_place` gives it its name.
    """
    match kind_of(out):
        case "parquet":
            table.write(temporary, table.schema(footer), parts)
        case "folder":
            _write_folder(temporary, footer, parts)
        case "array":
            arrays.write(out.suffix, temporary, footer, parts)
        case "lance":
            lance.write(temporary, footer, parts)


def take_place(out: Path, temporary: Path) -> None:
    """Gives what `write` wrote its final name; what stood there is gone.

    One rename, but for a matrix, whose name is missing for a moment: what it holds is never half of
    one table and half of another.
    """
    if kind_of(out) == "array":
        out.unlink(missing_ok=True)
        artifact.fsync_path(out.parent)
        table.take_place(arrays.ids_path(temporary), arrays.ids_path(out))
    if kind_of(out) in ("folder", "lance"):
        artifact.sweep(out.parent, out.name)
        artifact.take_place(temporary, out)
    else:
        table.take_place(temporary, out)


def footer_of(out: Path) -> Mapping[str, str] | None:
    """What the vectors under `out` say about themselves; None where nothing is there.

    Raises:
        IntegrityError: something that btpipe did not write, in a newer format, or incomplete.
    """
    match kind_of(out):
        case "parquet":
            return table.footer_of(out)
        case "folder":
            return _footer_of_folder(out)
        case "array":
            return arrays.footer_of(out)
        case "lance":
            return lance.footer_of(out)


def count(out: Path) -> int:
    """How many vectors are under `out`."""
    match kind_of(out):
        case "parquet":
            return table.count(out)
        case "folder":
            return sum(table.count(file) for file in _files(out))
        case "array":
            return table.count(arrays.ids_path(out))
        case "lance":
            return lance.count(out)


def rows(out: Path) -> Iterator[pa.RecordBatch]:
    """The rows under `out` with all their columns, in their order, some at a time.

    Pages of parquet are checked; matrices carry no checksum.
    """
    match kind_of(out):
        case "parquet":
            yield from _rows_of_file(out)
        case "folder":
            for file in _files(out):
                yield from _rows_of_file(file)
        case "array":
            yield from arrays.rows(out)
        case "lance":
            yield from lance.rows(out)


def _rows_of_file(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path.absolute(), page_checksum_verification=True) as file:
        yield from file.iter_batches(batch_size=table.ROW_GROUP_ROWS)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _footer_of_folder(folder: Path) -> Mapping[str, str] | None:
    if not folder.exists() or not any(folder.iterdir()):
        return None
    files = _files(folder)
    if not files:
        raise IntegrityError(
            "holds other things than vectors",
            where=folder,
            expected="part-*.parquet, an empty folder, or none",
            fix="choose another --out",
        )
    return table.footer_of(files[0])


def _write_folder(folder: Path, footer: table.Footer, parts: Iterable[pa.Table]) -> None:
    columns = table.schema(footer)
    folder.mkdir()
    number = -1
    for number, pieces in itertools.groupby(_cut(parts), key=lambda numbered: numbered[0]):
        path = folder / f"part-{number:06d}.parquet"
        table.write(path, columns, (piece for _, piece in pieces))
    if number < 0:  # without a row it still has its columns
        table.write(folder / "part-000000.parquet", columns, [])
    artifact.fsync_path(folder)


def _cut(parts: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Each stretch of rows with the number of its file, however they are spread over parts."""
    done = 0
    for part in parts:
        start = 0
        while start < part.num_rows:
            number, filled = divmod(done, FILE_ROWS)
            piece = part.slice(start, FILE_ROWS - filled)
            yield number, piece
            start, done = start + piece.num_rows, done + piece.num_rows
