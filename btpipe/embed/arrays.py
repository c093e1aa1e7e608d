"""Vectors as a bare matrix, `.npy` or `.safetensors`, with the rows' other columns beside it.

The header says how many rows follow, and stands before them. It is written twice: first with room
for any number, at last with the true one.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from btpipe.embed import table
from btpipe.errors import IntegrityError

TENSOR = "embedding"
_SAFETENSORS_TYPES: Mapping[table.Dtype, str] = {"float32": "F32", "float16": "F16"}
_MOST_DIGITS = 20
"""Of a number of rows or bytes in a header."""
_ALIGNMENT = 64


def ids_path(out: Path) -> Path:
    """`X.npy` -> `X.npy.ids.parquet`: path, digest, size and label of each row, and the footer."""
    return out.with_name(f"{out.name}.ids.parquet")


def write(ending: str, temporary: Path, footer: table.Footer, parts: Iterable[pa.Table]) -> None:
    """Streams parts to `temporary`, and the rows' other columns to its `ids_path`; fsyncs both."""
    columns = table.schema(footer)
    others = columns.remove(columns.get_field_index(TENSOR))
    with temporary.open("wb") as file:
        written = 0

        def without_vectors() -> Iterator[pa.Table]:
            nonlocal written
            for part in parts:
                vectors = matrix(part[TENSOR], footer.dimension)
                little = np.ascontiguousarray(vectors, np.dtype(footer.dtype).newbyteorder("<"))
                file.write(little.data)
                written += len(vectors)
                yield part.drop_columns([TENSOR])

        _write_header(file, ending, footer, 0)
        table.write(ids_path(temporary), others, without_vectors())
        file.seek(0)
        _write_header(file, ending, footer, written)
        file.flush()
        os.fsync(file.fileno())


def matrix(column: pa.ChunkedArray, dimension: int) -> NDArray[np.floating]:
    """A column of fixed-size lists as `(n, D)`, in the column's own type."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    flat: NDArray[np.floating] = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
    return flat.reshape(-1, dimension)


def require_finite(vectors: NDArray[np.floating], path: Path, start: int = 0) -> None:
    """Raises IntegrityError where one of a table's vectors (n, D), rows from `start` on, is not."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise IntegrityError(
            f"{np.count_nonzero(~finite)} vectors are not finite: the first is row"
            f" {start + int(finite.argmin())}",
            where=path,
            expected="numbers",
            fix="embed the images again, in --precision fp32 and --dtype float32",
        )


def footer_of(out: Path) -> Mapping[str, str] | None:
    """The footer that stands beside the matrix; None where there is no matrix.

    Raises:
        IntegrityError: no footer there, or one of another number of rows.
    """
    if not out.exists():
        return None
    metadata = table.footer_of(ids_path(out))
    if metadata is None or len(open_matrix(out)) != table.count(ids_path(out)):
        raise IntegrityError(
            f"{ids_path(out).name} is missing or of other vectors",
            where=out,
            fix="choose another --out, or replace it with --overwrite",
        )
    return metadata


def rows(out: Path) -> Iterator[pa.RecordBatch]:
    """The rows with all their columns, some at a time."""
    vectors, start = open_matrix(out), 0
    with pq.ParquetFile(ids_path(out).absolute(), page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=table.ROW_GROUP_ROWS):
            part = np.asarray(vectors[start : start + batch.num_rows])
            flat = pa.array(part.reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            yield batch.append_column(TENSOR, lists)
            start += batch.num_rows


def open_matrix(out: Path) -> NDArray[np.floating]:
    """The matrix `(n, D)`, mapped and not read.

    Raises:
        IntegrityError: not such a file, or one that was cut.
    """
    try:
        if out.suffix == ".npy":
            mapped: NDArray[np.floating] = np.load(out, mmap_mode="r", allow_pickle=False)
        else:
            mapped = _open_safetensors(out)
        if mapped.ndim != 2:
            raise ValueError(f"its shape is {mapped.shape}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"is no matrix of vectors ({error})",
            where=out,
            fix="choose another --out, or replace it with --overwrite",
        ) from error
    return mapped


def _write_header(file: BinaryIO, ending: str, footer: table.Footer, count: int) -> None:
    shape = (count, footer.dimension)
    if ending == ".npy":
        # numpy leaves room for the first axis to grow.
        description = {
            "shape": shape,
            "fortran_order": False,
            "descr": np.dtype(footer.dtype).newbyteorder("<").str,
        }
        np.lib.format.write_array_header_1_0(file, description)
        return
    itemsize = np.dtype(footer.dtype).itemsize
    entry = {
        "dtype": _SAFETENSORS_TYPES[footer.dtype],
        "shape": shape,
        "data_offsets": (0, count * footer.dimension * itemsize),
    }
    content = {"__metadata__": footer.metadata(), TENSOR: entry}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digits = len(str(entry["shape"][0])) + len(str(entry["data_offsets"][1]))
    room = len(text) - digits + 2 * _MOST_DIGITS
    room += -(room + 8) % _ALIGNMENT
    file.write(room.to_bytes(8, "little") + text.encode().ljust(room))  # spaces may end a header


def _open_safetensors(out: Path) -> NDArray[np.floating]:
    with out.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < out.stat().st_size:
            raise ValueError("its header is longer than the file")
        entry = json.loads(file.read(length))[TENSOR]
    names = {text: name for name, text in _SAFETENSORS_TYPES.items()}
    dtype, shape = np.dtype(names[entry["dtype"]]).newbyteorder("<"), tuple(entry["shape"])
    size = int(np.prod(shape)) * dtype.itemsize
    if out.stat().st_size != 8 + length + size:
        raise ValueError(f"it holds {out.stat().st_size - 8 - length} bytes of vectors, not {size}")
    if size == 0:
        return np.zeros(shape, dtype)
    return np.memmap(out, dtype, mode="r", offset=8 + length, shape=shape)
