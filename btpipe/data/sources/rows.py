"""What a source found, as columns: Arrow batches of a few hundred rows, no million objects."""

import dataclasses
import os
from collections.abc import Sequence

import pyarrow as pa

from btpipe.data.header import Header
from btpipe.data.sources.source import Source
from btpipe.events import Kind, Rejected

SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("path_bytes", pa.binary()),
        pa.field("source", pa.int32(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("mtime_ns", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("orientation", pa.int8(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("mode", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("label", pa.string()),
    ]
)
"""path: what people see, `a/1.jpg`, `a.tar::1.jpg`, `a.parquet#17`; path_bytes: exact, where the
path is not UTF-8. source: number into `Index.sources`. offset: of a tar member's data, or the
number of a parquet row. width, height: upright, 0 where no header was read. mode: Pillow's colour
mode. digest: sha256 of the content, null unless it was read. mode, digest and offset are null in an
index of format 1."""
CHUNK_ROWS = 256


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """An image: its name in the source, its size in bytes and what its header says."""

    name: bytes
    file_bytes: int
    mtime_ns: int
    header: Header
    offset: int | None = None
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """Images of one source in their order, and what of it cannot be used."""

    batches: list[pa.RecordBatch]
    rejected: list[Rejected]


def readable(name: bytes) -> str:
    """A relative path as text: UTF-8 as it is, other bytes as %XX."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        pass  # a million names are rarely that: the loop is for those
    return "".join(
        f"%{ord(char) - 0xDC00:02X}" if 0xDC80 <= ord(char) <= 0xDCFF else char
        for char in name.decode("utf-8", "surrogateescape")
    )


def path_of(source: Source, name: bytes) -> bytes:
    """The exact path of a name in a source; absolute names and URLs stand for themselves."""
    if not source.is_container and (name.startswith(b"/") or b"://" in name):
        return name
    return os.fsencode(source.prefix) + name if source.prefix else name


def reject(source: Source, name: bytes, reason: str, kind: Kind = "content") -> Rejected:
    """The reject of a name in a source."""
    return Rejected(readable(path_of(source, name)), "index", kind, reason)


def reject_whole(source: Source, reason: str, kind: Kind = "content") -> Rejected:
    """The reject of a container itself."""
    path = os.fsencode(source.prefix.removesuffix("::").removesuffix("#") or source.place)
    return Rejected(readable(path), "index", kind, reason)


def batch(source: Source, rows: Sequence[ImageRow]) -> pa.RecordBatch:
    """Rows as columns; their source's number is 0 until it is known."""
    exact = [path_of(source, row.name) for row in rows]
    paths = [readable(path) for path in exact]
    columns = {
        "path": paths,
        "path_bytes": [
            None if text.encode() == path else path for text, path in zip(paths, exact, strict=True)
        ],
        "source": [0] * len(rows),
        "offset": [row.offset for row in rows],
        "bytes": [row.file_bytes for row in rows],
        "mtime_ns": [row.mtime_ns for row in rows],
        "width": [row.header.width for row in rows],
        "height": [row.header.height for row in rows],
        "orientation": [row.header.orientation for row in rows],
        "format": [row.header.format for row in rows],
        "mode": [row.header.mode for row in rows],
        "digest": [None] * len(rows),
        "label": [row.label for row in rows],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)
