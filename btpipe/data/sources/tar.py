"""Images in tar files (WebDataset naming): where each member's data lies; nothing is extracted.

One pass over the headers, with memory that does not grow with the members. A damaged or cut tar
gives the members before the damage. Names are names: `../x.jpg` is listed and touches no file.
A compressed tar has no random access and is refused.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Self

import pyarrow as pa

from btpipe.data import header
from btpipe.data.rejects import BadInputError, is_machine, unreadable
from btpipe.data.retry import Patience
from btpipe.data.sources import storage
from btpipe.data.sources.rows import (
    CHUNK_ROWS,
    SCHEMA,
    ImageRow,
    SourceRows,
    batch,
    reject,
    reject_whole,
)
from btpipe.data.sources.source import Source
from btpipe.events import Rejected

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_COMPRESSED_REASON = "a compressed tar has no random access: unpack it (gunzip FILE)"
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_MOST_NAME_BYTES = 1 << 20
"""A longer extended header is a lie: it would be read into memory."""
_MOST_LABEL_BYTES = 1 << 16
_EXTENDED = frozenset({tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}) | frozenset(
    {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
_KINDS = {
    tarfile.SYMTYPE: "a link in a tar is not followed: put the file itself there",
    tarfile.LNKTYPE: "a hard link in a tar is not followed: put the file itself there",
    tarfile.CHRTYPE: "not a regular file (device)",
    tarfile.BLKTYPE: "not a regular file (device)",
    tarfile.FIFOTYPE: "not a regular file (pipe)",
}


class _Member(tarfile.TarInfo):
    """A member whose extended headers are not read when they claim to be huge."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        file = tarfile.fileobj
        assert file is not None
        start = file.tell()
        member = cls.frombuf(file.read(512), tarfile.encoding or "utf-8", "surrogateescape")
        if member.type in _EXTENDED and not 0 <= member.size <= _MOST_NAME_BYTES:
            raise ValueError(f"a name of {member.size} bytes")
        file.seek(start)
        return super().fromtarfile(tarfile)


class _Window(io.RawIOBase):
    """A member's data as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        count = max(min(len(buffer), self._size - self._at), 0)
        self._file.seek(self._offset + self._at)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def look(source: Source) -> SourceRows:
    """The images of a tar file, and what in it cannot be used."""
    patience, place = Patience(source.place), source.place

    def look_at_all() -> SourceRows:
        with storage.open_binary(place, patience) as file:
            return _look(source, file)

    try:
        if storage.is_url(place):  # its parts are asked for patiently
            return look_at_all()
        return patience.read(look_at_all, lambda: storage.read_file_range(place, 0, 1))
    except OSError as error:
        bad = unreadable(error)
        return SourceRows([], [reject_whole(source, bad.reason, bad.kind)])


def _look(source: Source, file: BinaryIO) -> SourceRows:
    rows: list[ImageRow] = []
    source_rows = SourceRows([], [])
    labels: dict[bytes, str] = {}
    names: list[bytes] = []
    seen: set[bytes] = set()
    for member in _members(source, file):
        if isinstance(member, Rejected):
            source_rows.rejected.append(member)
            continue
        name = member.name.encode("utf-8", "surrogateescape")
        if _is_hidden(name) or member.isdir():
            continue
        key, _, extension = _split(name)
        if extension in {b"cls", b"json"} and member.isreg():
            label = _label(file, member, is_json=extension == b"json")
            if label is not None and (extension == b"cls" or key not in labels):
                labels[key] = label
            continue
        result = _look_at(source, file, member, name)
        if isinstance(result, ImageRow) and name in seen:
            # Named apart: a reject's path must not be that of an image.
            second = f" (again at byte {member.offset})".encode()
            result = reject(source, name + second, "a second member of this name")
        if isinstance(result, Rejected):
            source_rows.rejected.append(result)
        elif result is not None:
            seen.add(name)
            rows.append(result)
            names.append(name)
            if len(rows) == CHUNK_ROWS:
                source_rows.batches.append(batch(source, rows))
                rows = []
    if rows:
        source_rows.batches.append(batch(source, rows))
    return _labelled(source_rows, names, labels) if labels else source_rows


def _labelled(source_rows: SourceRows, names: list[bytes], labels: dict[bytes, str]) -> SourceRows:
    """The same rows with the label of each one's key."""
    table = pa.Table.from_batches(source_rows.batches, SCHEMA)
    column = pa.array([labels.get(_split(name)[0]) for name in names], pa.string())
    position = SCHEMA.get_field_index("label")
    labelled = table.combine_chunks().set_column(position, SCHEMA.field("label"), column)
    return SourceRows(labelled.to_batches(), source_rows.rejected)


def _members(source: Source, file: BinaryIO) -> Iterator[tarfile.TarInfo | Rejected]:
    """Members whose data is all there, up to the end or the damage, which is the last reject."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(6)
    if not start or start.startswith(_COMPRESSED_MAGIC):
        yield reject_whole(source, _COMPRESSED_REASON if start else "empty file")
        return
    file.seek(0)
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=_Member, errors="surrogateescape")
    except Exception as error:  # a parser of hostile files raises anything; all of it is a reason
        _raise_machines(error)
        yield reject_whole(source, f"not a tar file, or one damaged at its start: {error}")
        return
    tar.offset = 0
    while (member := _next(source, tar, file, size)) is not None:
        yield member
        if isinstance(member, Rejected):
            return


def _next(
    source: Source, tar: tarfile.TarFile, file: BinaryIO, size: int
) -> tarfile.TarInfo | Rejected | None:
    """The member at `tar.offset`, why there is none, or None at the closing blocks."""
    at = tar.offset
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return reject_whole(source, f"cut at byte {size}: a tar's closing blocks are missing")
    if not block.strip(b"\0"):
        return None
    file.seek(at)
    try:
        member = _Member.fromtarfile(tar)
    except Exception as error:  # a parser of hostile files raises anything; all of it is a reason
        _raise_machines(error)
        return reject_whole(source, f"damaged at byte {at} ({error}): nothing behind it is used")
    name = member.name.encode("utf-8", "surrogateescape")
    if member.size < 0 or tar.offset <= at:
        return reject(source, name, f"a size of {member.size} bytes: nothing behind it is used")
    if member.isreg() and member.offset_data + member.size > size:
        missing = member.offset_data + member.size - size
        return reject(source, name, f"cut: the tar file ends {missing} bytes too early")
    return member


def _raise_machines(error: Exception) -> None:
    """Raises what says nothing of the file: the disk or the network failed."""
    if is_machine(error):
        raise error


def _look_at(
    source: Source, file: BinaryIO, member: tarfile.TarInfo, name: bytes
) -> ImageRow | Rejected | None:
    """The row of a member, why it is refused, or None where nothing says that it is an image."""
    if not member.isreg() or member.issparse():
        return reject(source, name, _KINDS.get(member.type, "not a regular file"))
    window = io.BufferedReader(_Window(file, member.offset_data, member.size))
    try:
        image_header = header.look(window, name)
    except BadInputError as error:
        is_reported = header.is_image_or_named(error, name)
        return reject(source, name, error.reason, error.kind) if is_reported else None
    return ImageRow(name, member.size, source.mtime_ns, image_header, member.offset_data)


def _is_hidden(name: bytes) -> bool:
    return any(part.startswith(b".") and part not in {b".", b".."} for part in name.split(b"/"))


def _split(name: bytes) -> tuple[bytes, bytes, bytes]:
    """WebDataset's key and extension: the base name is cut at its first dot."""
    folder, slash, base = name.rpartition(b"/")
    key, dot, extension = base.partition(b".")
    return folder + slash + key, dot, extension.lower()


def _label(file: BinaryIO, member: tarfile.TarInfo, *, is_json: bool) -> str | None:
    """What a `.cls` says, or a `.json` that is a word, a number, or has a `label` or `cls`."""
    if member.size > _MOST_LABEL_BYTES:
        return None
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode().strip()
        value = json.loads(text) if is_json else text
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    is_word = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value) if is_word and str(value) and "\n" not in str(value) else None
