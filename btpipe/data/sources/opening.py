"""The bytes of a source's images: how each is read is decided once, when the source is opened."""

import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

import pyarrow as pa

from btpipe.data.retry import Patience
from btpipe.data.sources import parquet, storage, synthetic
from btpipe.data.sources.source import Source

Read: TypeAlias = Callable[[int], tuple[bytes, int]]
"""Row of an index -> the image file's content and mtime_ns. Raises OSError."""


def patience(sources: Sequence[Source]) -> list[Patience]:
    """One for all that lies in one folder, or is named from one: it fails together."""
    folders = [s.place.rpartition("/")[0] if s.is_container else s.base for s in sources]
    shared = {folder: Patience(folder or "/") for folder in folders}
    return [shared[folder] for folder in folders]


def reader(source: Source, table: pa.Table, row_groups: parquet.RowGroups) -> Read:
    """What reads the rows of a source; `table` is the index that they are of."""
    if not source.is_container:
        return _files(source, table)
    offsets, sizes, times = (table[name] for name in ("offset", "bytes", "mtime_ns"))
    is_url = storage.is_url(source.place)
    read_range = storage.read_url_range if is_url else storage.read_file_range

    def read(row: int) -> tuple[bytes, int]:
        at = offsets[row].as_py()
        if source.kind == "tar":
            content = read_range(source.place, at, sizes[row].as_py())
        elif source.kind == "parquet":
            content = row_groups.read(source, at)
        else:
            content = synthetic.read(source, at)
        return content, times[row].as_py()

    return read


def _files(source: Source, table: pa.Table) -> Read:
    """Files of a folder or a list; only a list may name URLs, or files somewhere else."""
    paths, exact, times = (table[name] for name in ("path", "path_bytes", "mtime_ns"))
    prefix, base = source.prefix, source.base.rstrip("/") + "/"
    is_url = storage.is_url(base)

    def read(row: int) -> tuple[bytes, int]:
        raw = exact[row].as_py()
        path = os.fsdecode(raw) if raw else paths[row].as_py()
        name = path.removeprefix(prefix)
        if name.startswith("/"):
            return storage.read_file(name)
        if "://" in name and storage.is_url(name):
            return storage.read_url(name), times[row].as_py()
        if is_url:
            return storage.read_url(base + name), times[row].as_py()
        return storage.read_file(base + name)

    return read
