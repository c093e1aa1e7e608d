"""Images in parquet files, the Hugging Face layout: a column of struct<bytes, path>, or of binary.

Row groups are the unit of reading: the last ones used are kept in memory. Large ones make random
access slow, so huge ones are refused.
"""

import collections
import errno
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from btpipe.data import header
from btpipe.data.rejects import BadInputError, is_machine, unreadable, unusable
from btpipe.data.retry import CONTACT_SECONDS, Patience
from btpipe.data.sources import storage
from btpipe.data.sources.rows import CHUNK_ROWS, ImageRow, SourceRows, batch, reject, reject_whole
from btpipe.data.sources.source import Source
from btpipe.errors import UsageError
from btpipe.events import Rejected

CACHE_BYTES = 256 << 20
"""Row groups kept in memory, for all parquet files of an index together."""
MOST_GROUP_BYTES = 1 << 30
"""A larger row group is refused: one image would cost as much memory and time."""
_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
"""Binary columns that hold images; of structs any name does."""


def image_column(schema: pa.Schema, chosen: str, location: str) -> str:
    """The column whose values are image files, `chosen` or the only one; "" where there is none.

    Raises:
        UsageError: there are several, and none is chosen; or `chosen` is no such column.
    """
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and _holds_bytes(f.type)]
    binary = [field.name for field in schema if _is_binary(field.type)]
    if chosen and chosen not in structs + binary:
        what = f"no image column {chosen!r}"
        raise UsageError(what, where=location, expected=", ".join(structs + binary) or "images")
    found = [chosen] if chosen else structs + [name for name in _NAMES if name in binary]
    if len(found) > 1:
        raise UsageError(
            f"images in {len(found)} columns: {', '.join(found)}",
            where=location,
            expected="one",
            fix=f"choose it: --image-column {found[0]} (scan, shard and embed take it); elsewhere"
            " name the index.parquet of such a scan",
        )
    has_paths = "path" in schema.names
    return (found or ([] if has_paths or len(binary) != 1 else binary) or [""])[0]


def _holds_bytes(struct: pa.StructType) -> bool:
    position = struct.get_field_index("bytes")
    return position >= 0 and _is_binary(struct.field(position).type)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def look(source: Source) -> SourceRows:
    """The images of a parquet file, and the rows that cannot be used."""
    source_rows, rows = SourceRows([], []), list[ImageRow]()
    try:
        for result in _rows(source):
            if isinstance(result, Rejected):
                source_rows.rejected.append(result)
                continue
            rows.append(result)
            if len(rows) == CHUNK_ROWS:
                source_rows.batches.append(batch(source, rows))
                rows = []
    except (OSError, pa.ArrowException) as error:
        kind = unreadable(error).kind if isinstance(error, OSError) else "content"
        reason = f"damaged parquet, or it cannot be read: {str(error).splitlines()[0]}"
        source_rows.rejected.append(reject_whole(source, reason, kind))
    if rows:
        source_rows.batches.append(batch(source, rows))
    return source_rows


def _rows(source: Source) -> Iterator[ImageRow | Rejected]:
    patience = Patience(source.place)
    with storage.open_binary(source.place, patience) as opened, pq.ParquetFile(opened) as file:
        names = _class_names(file.schema_arrow)
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            count = file.metadata.row_group(group).num_rows
            if size > MOST_GROUP_BYTES:
                reason = f"rows {number} to {number + count - 1}: a row group of {size >> 20} MiB,"
                fix = f"at most {MOST_GROUP_BYTES >> 20} are read: write it with smaller ones"
                yield reject_whole(source, f"{reason} {fix}")
                number += count
                continue
            images = _images(file, group, source.column)
            labels = _labels(file, group, names)
            for content, label in zip(images, labels, strict=True):
                yield _row(source, number, content, label)
                number += 1


def _row(source: Source, number: int, image: pa.Scalar, label: str | None) -> ImageRow | Rejected:
    name = str(number).encode()
    buffer = image.as_buffer()
    if buffer is None:
        return reject(source, name, "no image bytes in this row")
    try:
        image_header = header.look(io.BytesIO(buffer), name)
    except BadInputError as error:
        return reject(source, name, error.reason, error.kind)
    return ImageRow(name, buffer.size, source.mtime_ns, image_header, number, label)


def _images(file: pq.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
    """A row group's image files."""
    is_struct = pa.types.is_struct(file.schema_arrow.field(column).type)
    column_path = f"{column}.bytes" if is_struct else column
    values = file.read_row_group(group, columns=[column_path], use_threads=False)[column]
    if not is_struct:
        return values
    parts = [chunk.flatten()[0] for chunk in values.chunks]  # a null struct has null bytes
    return pa.chunked_array(parts, file.schema_arrow.field(column).type.field("bytes").type)


def _labels(file: pq.ParquetFile, group: int, names: list[str]) -> list[str | None]:
    """A row group's labels as words; -1 among class numbers means none."""
    if "label" not in file.schema_arrow.names:
        return [None] * int(file.metadata.row_group(group).num_rows)
    kind = file.schema_arrow.field("label").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        return [None] * int(file.metadata.row_group(group).num_rows)
    values = file.read_row_group(group, columns=["label"], use_threads=False)["label"].to_pylist()
    return [_label(value, names) for value in values]


def _label(value: int | str | None, names: list[str]) -> str | None:
    if isinstance(value, int):
        if value < 0:
            return None
        return names[value] if value < len(names) else str(value)
    return value


def _class_names(schema: pa.Schema) -> list[str]:
    """The names behind integer labels, where Hugging Face's metadata tells them."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        names = metadata["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


class RowGroups:
    """Image bytes by row number; the row groups used last stay in memory, whatever the thread."""

    def __init__(self, most_bytes: int = CACHE_BYTES) -> None:
        self._most_bytes, self._lock = most_bytes, threading.Lock()
        self._files: dict[str, tuple[pq.FileMetaData, NDArray[np.int64]]] = {}
        self._groups: collections.OrderedDict[tuple[str, int], Future[pa.ChunkedArray]] = (
            collections.OrderedDict()
        )
        self.bytes = 0
        """What is kept now."""

    def read(self, source: Source, row: int) -> bytes:
        """The image file in a row.

        Raises:
            OSError: the file cannot be read, or has another content by now.
        """
        try:
            metadata, starts = self._metadata(source.place)
            group = int(np.searchsorted(starts, row, side="right")) - 1
            if group >= metadata.num_row_groups:
                raise OSError(errno.EINVAL, f"has {starts[-1]} rows, no row {row}")
            content = self._group(source, group, metadata)[row - int(starts[group])].as_buffer()
        except (pa.ArrowException, KeyError) as error:
            raise OSError(errno.EINVAL, str(error).splitlines()[0]) from error
        if content is None:
            raise OSError(errno.EINVAL, "no image bytes in this row")
        return bytes(content)

    def _metadata(self, location: str) -> tuple[pq.FileMetaData, NDArray[np.int64]]:
        """A file's metadata, and the first row of each row group."""
        entry = self._files.get(location)
        if entry is None:
            with storage.open_binary(location) as file:
                metadata = pq.read_metadata(file)
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            entry = self._files[location] = metadata, np.cumsum([0, *sizes], dtype=np.int64)
        return entry

    def _group(self, source: Source, group: int, metadata: pq.FileMetaData) -> pa.ChunkedArray:
        key = (source.place, group)
        with self._lock:
            future = self._groups.get(key)
            is_mine = future is None
            if future is None:
                future = self._groups[key] = Future()
            self._groups.move_to_end(key)
        if is_mine:
            try:
                images = self._load(source, group, metadata)
            except BaseException as error:
                with self._lock:
                    self._groups.pop(key, None)
                future.set_exception(error)
                raise
            future.set_result(images)
            self._make_room(images.nbytes)
        return future.result()

    def _load(self, source: Source, group: int, metadata: pq.FileMetaData) -> pa.ChunkedArray:
        with (
            storage.open_binary(source.place) as opened,
            pq.ParquetFile(opened, metadata=metadata) as file,
        ):
            return _images(file, group, source.column)

    def _make_room(self, more: int) -> None:
        """Counts a row group that came, and drops the oldest ones that are too many."""
        with self._lock:
            self.bytes += more
            for key in list(self._groups):
                if self.bytes <= self._most_bytes or len(self._groups) == 1:
                    return
                oldest = self._groups[key]
                if oldest.done() and oldest.exception() is None:
                    self.bytes -= oldest.result().nbytes
                    del self._groups[key]


def schema(location: str) -> pa.Schema:
    """The columns of a parquet file.

    Raises:
        UsageError: it cannot be read as one.
    """
    try:
        with storage.open_binary(location, Patience(location, CONTACT_SECONDS)) as file:
            return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        if is_machine(error):
            raise unusable(cast(OSError, error), location) from error
        what = f"not a readable parquet file ({str(error).splitlines()[0]})"
        raise UsageError(what, where=location) from error
