"""Lists of image files: .txt with a path on each line, .csv or .parquet with a column `path`.

Relative paths are relative to the list's folder. A column `label` is taken where there is one.
"""

import csv
import io
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from btpipe.data import rejects, retry
from btpipe.data.sources import folder, storage
from btpipe.data.sources.listing_cache import Recall
from btpipe.data.sources.rows import SCHEMA, SourceRows
from btpipe.data.sources.source import Source
from btpipe.errors import UsageError

Entries = tuple[list[bytes], list[str | None]]
"""Paths and their labels."""


def look(
    source: Source,
    on_progress: folder.OnProgress,
    previous: Recall = folder.NOTHING,
    *,
    list_only: bool = False,
) -> SourceRows:
    """The images that a list names, in its order; each other entry is a reject with a reason.

    Raises:
        UsageError: the list cannot be read, or has no column `path`.
    """
    try:
        if storage.is_standard_input(source.place):
            content = sys.stdin.buffer.read()
        else:
            patience = retry.Patience(source.place)
            content = patience.read(lambda: storage.read(source.place))
    except OSError as error:
        raise rejects.unusable(error, source.place) from error
    names, labels = _read(source.place, content)
    first: dict[bytes, str | None] = {}
    for name, label in zip(names, labels, strict=True):
        first.setdefault(name, label)  # a file that is listed twice is one image
    source_rows = folder.look_at(source, list(first), on_progress, previous, list_only=list_only)
    is_labelled = any(label is not None for label in first.values())
    return (
        _labelled(source, source_rows, first)
        if is_labelled and source_rows.batches
        else source_rows
    )


def _read(location: str, content: bytes) -> Entries:
    kind = location.lower().rpartition(".")[2]
    if kind == "csv":
        return _read_csv(location, content)
    if kind == "parquet":
        return _read_parquet(location, content)
    if b"\0" in content:  # as `find -print0` writes: names may hold newlines
        lines = content.split(b"\0")
    else:
        lines = [line.removesuffix(b"\r") for line in content.split(b"\n")]
    names = [line for line in lines if line.strip()]
    return names, [None] * len(names)


def _read_csv(location: str, content: bytes) -> Entries:
    text = content.decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if "path" not in (reader.fieldnames or ()):
            raise _no_paths(location, list(reader.fieldnames or ()))
        rows = [row for row in reader if row["path"]]
    except csv.Error as error:
        raise UsageError(f"not a readable .csv ({error})", where=location) from error
    names = [row["path"].encode("utf-8", "surrogateescape") for row in rows]
    return names, [row.get("label") or None for row in rows]


def _read_parquet(location: str, content: bytes) -> Entries:
    file = pq.ParquetFile(io.BytesIO(content))
    schema = file.schema_arrow
    if not has_paths(schema):
        raise _no_paths(location, schema.names)
    columns = [name for name in ("path", "path_bytes", "label") if name in schema.names]
    table = file.read(columns=columns)
    exact = table["path_bytes"].to_pylist() if "path_bytes" in columns else [None] * len(table)
    names = [
        raw if isinstance(raw, bytes) else (path or "").encode()
        for path, raw in zip(table["path"].to_pylist(), exact, strict=True)
    ]
    labels = table["label"].to_pylist() if "label" in columns else [None] * len(table)
    return names, [None if label is None else str(label) for label in labels]


def has_paths(schema: pa.Schema) -> bool:
    """Whether a parquet file has a column of paths."""
    if "path" not in schema.names:
        return False
    kind = schema.field("path").type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _no_paths(location: str, columns: list[str]) -> UsageError:
    names = ", ".join(columns) or "nothing"
    return UsageError(
        f"no column `path` (there is: {names})", where=location, expected="a file list"
    )


def _labelled(
    source: Source, source_rows: SourceRows, labels: dict[bytes, str | None]
) -> SourceRows:
    prefix = os.fsencode(source.prefix)
    table = pa.Table.from_batches(source_rows.batches, SCHEMA)
    paths = zip(table["path"].to_pylist(), table["path_bytes"].to_pylist(), strict=True)
    exact = [raw or path.encode() for path, raw in paths]
    # An absolute name carries no prefix.
    column = [labels.get(path, labels.get(path.removeprefix(prefix))) for path in exact]
    position = SCHEMA.get_field_index("label")
    table = table.set_column(position, SCHEMA.field("label"), pa.array(column, pa.string()))
    return SourceRows(table.to_batches(), source_rows.rejected)
