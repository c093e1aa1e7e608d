"""Which images there are: an Arrow table of paths, sizes and labels, made by one walk of a folder.

Content decides what is an image, not the extension. Every file with the name or the content of an
image ends in the table or in the rejects. Hidden files and folders are passed over.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import hashlib
import io
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from btpipe import artifact
from btpipe.data import header, patience
from btpipe.data.sources import Source, source
from btpipe.errors import IntegrityError, UsageError
from btpipe.events import FileRejected, Progressed, Report, ignore

FORMAT_VERSION = 2
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
number of a parquet row. width, height: upright. mode: Pillow's colour mode. digest: sha256 of the
content, null unless it was read. mode, digest and offset are null in an index of format 1."""
HEADER_THREADS = 16
_CHUNK_FILES = 256
_PROGRESS_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Row:
    """An image: its path below the root, its file and what its header says."""

    name: bytes
    file_bytes: int
    mtime_ns: int
    found: header.Header


Refused = tuple[bytes, str]
"""A file or folder that is not used, and why."""


@dataclasses.dataclass(frozen=True)
class Index:
    """The images of `sources`, one row each; `width` and `height` are upright.

    `root` is the folder that holds all of it. Without sources it is the only one.
    """

    root: Path
    table: pa.Table
    sources: tuple[Source, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def file(self, row: int) -> Path:
        """Where the image of a row is; the exact bytes of its name."""
        exact = self.table["path_bytes"][row].as_py()
        return self.root / (os.fsdecode(exact) if exact else self.table["path"][row].as_py())

    def read_bytes(self, row: int) -> bytes:
        """The file's content; a stumbling disk or network is tried again before it raises.

        Raises:
            OSError: vanished, not permitted, no longer a regular file.
        """
        path = self.file(row)
        return patience.read_patiently(lambda: read_regular(path))

    @functools.cached_property
    def widths(self) -> NDArray[np.int32]:
        return np.array(self.table["width"], dtype=np.int32)

    @functools.cached_property
    def heights(self) -> NDArray[np.int32]:
        return np.array(self.table["height"], dtype=np.int32)

    @property
    def labels(self) -> list[str | None]:
        return list(self.table["label"].to_pylist())

    @functools.cached_property
    def fingerprint(self) -> str:
        """The data's identity: sha256 over path, size in bytes, width and height of every row."""
        digest = hashlib.sha256("\0".join(self.table["path"].to_pylist()).encode())
        for name in ("bytes", "width", "height"):
            digest.update(np.array(self.table[name], dtype="<i8").tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the index as parquet, whole or not at all.

        Raises:
            MachineError: no space, or no permission.
        """
        metadata = {
            "root": os.fsencode(self.root),
            "format_version": str(FORMAT_VERSION),
            "sources": source.to_json(self.sources),
        }
        content = io.BytesIO()
        pq.write_table(self.table.replace_schema_metadata(metadata), content)
        artifact.write_file(path, content.getvalue())


def open_index(path: Path) -> Index:
    """The index that `save` wrote.

    Raises:
        IntegrityError: no such file, not an index, or written by a newer btpipe.
    """
    try:
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        root, version = Path(os.fsdecode(metadata[b"root"])), int(metadata[b"format_version"])
        sources = source.from_json(metadata.get(b"sources", b"[]").decode())
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        what = f"not a readable index ({error})"
        raise IntegrityError(what, where=path, fix="make it again from the folder") from error
    if version > FORMAT_VERSION:
        expected = f"format_version {FORMAT_VERSION} or older"
        fix = "install a newer btpipe, or make the index again"
        raise IntegrityError(f"format_version {version}", where=path, expected=expected, fix=fix)
    table = table.replace_schema_metadata(None)
    table = _of_format_1(table) if version == 1 else table
    if table.schema != SCHEMA:
        raise IntegrityError(
            f"columns {table.column_names}", where=path, expected=f"{SCHEMA.names}"
        )
    return Index(root, table.combine_chunks(), sources)


def _of_format_1(table: pa.Table) -> pa.Table:
    """An older index with the columns that came since: one source, and null."""
    for i, field in enumerate(SCHEMA):
        if field.name not in table.column_names:
            zeros = pa.array(np.zeros(table.num_rows, np.int32))
            nulls = pa.nulls(table.num_rows, field.type)
            table = table.add_column(i, field, zeros if field.name == "source" else nulls)
    return table


def build(root: Path, report: Report = ignore) -> tuple[Index, list[FileRejected]]:
    """Walks `root`, reads every image's header, and returns the images and what was refused.

    Raises:
        UsageError: `root` is not a folder, or there is no image below it.
    """
    if not root.is_dir():
        fix = "name a folder that holds images (JPEG, PNG, WebP, TIFF, BMP, PPM, JPEG 2000)"
        raise UsageError("no such folder", where=root, expected="a folder of images", fix=fix)
    root = root.absolute()
    paths, refused = walk(root)
    rows: list[Row] = []
    started = reported = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(HEADER_THREADS) as pool:
        chunks = [paths[i : i + _CHUNK_FILES] for i in range(0, len(paths), _CHUNK_FILES)]
        for done, results in enumerate(pool.map(functools.partial(look_at_all, root), chunks), 1):
            rows += [result for result in results if isinstance(result, Row)]
            refused += [result for result in results if isinstance(result, tuple)]
            if (now := time.monotonic()) - reported > _PROGRESS_SECONDS:
                files, reported = min(done * _CHUNK_FILES, len(paths)), now
                report(Progressed("index", files, len(paths), files / (now - started), 0.0))
    rejected = [
        FileRejected(readable(name), "index", reason) for name, reason in sorted(set(refused))
    ]
    for event in rejected:
        report(event)
    if not rows:
        raise UsageError(
            f"no image in {len(paths)} files ({len(rejected)} rejected)",
            where=root,
            expected="JPEG, PNG, WebP, TIFF, BMP, PPM or JPEG 2000 files, in folders of any depth",
            fix="put the images there, or name the folder that holds them",
        )
    return Index(root, _table(rows)), rejected


def readable(name: bytes) -> str:
    """A relative path as text: UTF-8 as it is, other bytes as %XX."""
    return "".join(
        f"%{ord(char) - 0xDC00:02X}" if 0xDC80 <= ord(char) <= 0xDCFF else char
        for char in name.decode("utf-8", "surrogateescape")
    )


def read_regular(path: Path) -> bytes:
    """The content of a regular file; never waits on a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.readall()


def walk(root: Path) -> tuple[list[bytes], list[Refused]]:
    """Relative paths of the files to look at, sorted by their bytes, and what is refused unread."""
    inside, top = os.path.realpath(os.fsencode(root)) + b"/", os.fsencode(root)
    paths: list[bytes] = []
    refused: list[Refused] = []
    folders = [b""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(top + b"/" + folder))
        except OSError as error:
            refused.append((folder, f"folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            name = folder + b"/" + entry.name if folder else entry.name
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
                if header.has_image_name(entry.name):
                    refused.append((name, "a folder, not a file; what is in it was looked at"))
            elif entry.is_symlink():
                reason = _refuse_link(entry, inside)
                paths.append(name) if reason is None else refused.append((name, reason))
            elif entry.is_file(follow_symlinks=False):
                paths.append(name)
            elif header.has_image_name(entry.name):
                refused.append((name, "not a regular file (pipe, socket or device)"))
    return sorted(paths), refused


def _refuse_link(entry: "os.DirEntry[bytes]", inside: bytes) -> str | None:
    """Why a link is not followed; None where it leads to a file inside the folder."""
    try:
        target = os.path.realpath(entry.path, strict=True)
    except OSError as error:
        return "a link in a circle" if error.errno == errno.ELOOP else "a link to nothing"
    if not target.startswith(inside):
        return "a link that leads out of the folder: put the file itself there, or a hard link"
    if entry.is_dir():
        return "a link to a folder that is searched under its own name"
    return None if entry.is_file() else "not a regular file (pipe, socket or device)"


def look_at_all(root: Path, names: list[bytes]) -> list[Row | Refused | None]:
    """Reads the header of each file; None where nothing says that it is an image."""
    return [_look_at(root, name) for name in names]


def _look_at(root: Path, name: bytes) -> Row | Refused | None:
    """The row of a file, why it is refused, or None where nothing says that it is an image."""
    path = root / os.fsdecode(name)
    try:
        status = path.stat()
        found = header.read(path)
    except OSError as error:
        named = header.has_image_name(name)
        return (name, f"cannot be read: {error.strerror or error}") if named else None
    if isinstance(found, header.Header):
        return Row(name, status.st_size, status.st_mtime_ns, found)
    if found.is_image or header.has_image_name(name):
        return (name, found.reason)
    return None


def _table(rows: list[Row]) -> pa.Table:
    paths = [readable(row.name) for row in rows]
    plain = [path.encode() == row.name for path, row in zip(paths, rows, strict=True)]
    columns = {
        "path": paths,
        "path_bytes": [None if p else row.name for p, row in zip(plain, rows, strict=True)],
        "source": np.zeros(len(rows), np.int32),
        "offset": pa.nulls(len(rows), pa.int64()),
        "bytes": [row.file_bytes for row in rows],
        "mtime_ns": [row.mtime_ns for row in rows],
        "width": [row.found.width for row in rows],
        "height": [row.found.height for row in rows],
        "orientation": [row.found.orientation for row in rows],
        "format": [row.found.format for row in rows],
        "mode": [row.found.mode for row in rows],
        "digest": pa.nulls(len(rows), pa.string()),
        "label": list(_labels(paths)),
    }
    return pa.table(columns, schema=SCHEMA)


def _labels(paths: list[str]) -> Iterator[str | None]:
    """The first folder of each path, where every image is in one."""
    first = [PurePosixPath(path).parts[0] if "/" in path else None for path in paths]
    return iter(first if all(first) else [None] * len(first))
