"""Bytes of a local file or of a URL: opened, measured, read in part.

URLs (s3, gs, http, memory, ...) go through fsspec, which is imported when the first one is met.
"""

import datetime as dt
import email.utils
import errno
import functools
import hashlib
import io
import os
import re
import stat
from collections.abc import Mapping
from typing import BinaryIO, Protocol, cast

from btpipe.data import retry
from btpipe.errors import UsageError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WHOLE_BYTES = 1 << 20
"""Remote files up to this size are fetched at once: a request costs more than the bytes."""
_PART_BYTES = 1 << 20
"""Read at a time of larger ones."""
_BUSY_STATUS = frozenset({408, 429})
"""HTTP below 500 that says to ask again: timed out, too many requests."""


class Remote(Protocol):
    """The part of fsspec's file systems that is used here."""

    def info(self, path: str) -> dict[str, object]: ...
    def find(self, path: str, *, detail: bool) -> list[str]: ...
    def glob(self, path: str) -> list[str]: ...
    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def unstrip_protocol(self, name: str) -> str: ...


def is_url(text: str) -> bool:
    """Whether the text is a URL (or names synthetic images) rather than a path."""
    return _URL.match(text) is not None or is_synthetic(text)


def is_standard_input(location: str) -> bool:
    """Whether it is the list on standard input: `-` in the folder that its names are from."""
    return location.rpartition("/")[2] == "-" and not os.path.lexists(location)


def is_synthetic(text: str) -> bool:
    """Whether the text names images that are made in memory: `synthetic:COUNTxSIZE`."""
    return text.startswith("synthetic:")


def remote(url: str) -> tuple[Remote, str]:
    """The file system of a URL, and its path there.

    Raises:
        UsageError: fsspec or its driver for this kind of URL is not installed.
    """
    fix = "pip install 'btpipe[remote]'"
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise UsageError("URLs need fsspec", where=url, fix=fix) from error
    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        fix += " and the driver: s3fs for s3://, gcsfs for gs://, adlfs for az://"
        raise UsageError(f"cannot be read: {error}", where=url, fix=fix) from error
    return cast(Remote, system), cast(str, path)


def join(base: str, name: str) -> str:
    """`name` seen from the folder `base`; absolute names and URLs stand for themselves."""
    if is_url(name):
        return name
    return name if name.startswith("/") else f"{base.rstrip('/')}/{name}"


def measure(location: str) -> tuple[int, int]:
    """(bytes, mtime_ns) of a regular file.

    Of a URL the second is when it was changed, or a number made of its ETag, or 0: whatever its
    server tells. 0 bytes where it tells no size.

    Raises:
        OSError: there is none, or it is a pipe, a device or a folder.
    """
    if is_url(location):
        info = _info(location)
        return cast(int, info.get("size") or 0), _changed_ns(info)
    status = os.stat(location)  # noqa: PTH116 - a million of them: half the time of a Path
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return status.st_size, status.st_mtime_ns


def _info(url: str) -> Mapping[str, object]:
    system, path = remote(url)
    try:
        return system.info(path)
    except Exception as error:  # every driver has its own errors
        raise _as_os_error(error) from error


def _changed_ns(info: Mapping[str, object]) -> int:
    """When a remote file was changed, in the words of s3fs, gcsfs, adlfs, http and memory.

    HTTP tells whole seconds: an ETag stands for the rest.
    """
    tag = str(info.get("ETag") or info.get("etag") or "")
    within = int(hashlib.sha256(tag.encode()).hexdigest()[:12], 16) % 10**9 if tag else 0
    for name in ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "created"):
        value = info.get(name)
        if isinstance(value, str):
            parsed = email.utils.parsedate_tz(value)
            if parsed is None:
                continue
            return email.utils.mktime_tz(parsed) * 10**9 + within
        if isinstance(value, dt.datetime):
            value = value.timestamp()
        if isinstance(value, int | float):
            return int(value * 1e9)
    return within


def names_below(url: str) -> list[str]:
    """Names of the files below the prefix of a URL, relative to it.

    Raises:
        OSError: it cannot be listed.
    """
    system, path = remote(url)
    base = system.unstrip_protocol(path).rstrip("/") + "/"
    try:
        paths = system.find(path, detail=False)
    except Exception as error:  # every driver has its own errors
        raise _as_os_error(error) from error
    files = [system.unstrip_protocol(name) for name in paths]
    return [file.removeprefix(base) for file in files if file.startswith(base)]


def open_binary(location: str, patience: retry.Patience | None = None) -> BinaryIO:
    """The file, open for reading with seeks; never waits on a pipe.

    `patience`: each part of a URL is asked for again where its server fails.

    Raises:
        OSError: it cannot be read.
    """
    if not is_url(location):
        return open(location, "rb", opener=_open_now)
    size, _ = patience.read(lambda: measure(location)) if patience else measure(location)
    if size <= _WHOLE_BYTES:
        content = patience.read(lambda: read_url(location)) if patience else read_url(location)
        return io.BytesIO(content)
    return io.BufferedReader(_Parts(location, size, patience), _PART_BYTES)


class _Parts(io.RawIOBase):
    """A remote file as ranges of it."""

    def __init__(self, url: str, size: int, patience: retry.Patience | None) -> None:
        self._url, self._size, self._at, self._patience = url, size, 0, patience

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: "bytearray | memoryview[int]") -> int:  # type: ignore[override]
        count = max(min(len(buffer), self._size - self._at), 0)
        read = functools.partial(read_url_range, self._url, self._at, count)
        buffer[:count] = self._patience.read(read) if self._patience else read()
        self._at += count
        return count


def _open_now(path: str, flags: int) -> int:
    """Opens without waiting for the other end, should a pipe have taken the file's place."""
    return os.open(path, flags | os.O_NONBLOCK)


def read(location: str) -> bytes:
    """The whole content of a regular file or a URL.

    Raises:
        OSError: vanished, not permitted, no longer a regular file.
    """
    return read_url(location) if is_url(location) else read_file(location)[0]


def read_url(url: str) -> bytes:
    """The whole content of a URL; raises as `read`."""
    system, path = remote(url)
    try:
        return system.cat_file(path)
    except Exception as error:  # every driver has its own errors
        raise _as_os_error(error) from error


def read_file(location: str) -> tuple[bytes, int]:
    """The content of a regular file, and the mtime_ns that it had before; raises as `read`."""
    descriptor = os.open(location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        content = os.read(descriptor, status.st_size + 1)
        if len(content) != status.st_size:  # it grew or shrank, or its system does in parts
            content += b"".join(iter(lambda: os.read(descriptor, _PART_BYTES), b""))
        return content, status.st_mtime_ns
    finally:
        os.close(descriptor)


def read_url_range(url: str, offset: int, count: int) -> bytes:
    """`count` bytes of a URL from `offset` on.

    Raises:
        OSError: as `read`, and where the file ends before that.
    """
    system, path = remote(url)
    try:
        content = system.cat_file(path, start=offset, end=offset + count) if count else b""
    except Exception as error:  # every driver has its own errors
        raise _as_os_error(error) from error
    if len(content) > count:
        what = "the server gives whole files only, no parts of them: download this one first"
        raise OSError(errno.EOPNOTSUPP, what)
    return _require_whole(content, count)


def read_file_range(location: str, offset: int, count: int) -> bytes:
    """`count` bytes of a regular file from `offset` on; raises as `read_url_range`."""
    descriptor = os.open(location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        content = os.pread(descriptor, count, offset)
        while 0 < len(content) < count:
            more = os.pread(descriptor, count - len(content), offset + len(content))
            if not more:
                break
            content += more
    finally:
        os.close(descriptor)
    return _require_whole(content, count)


def _require_whole(content: bytes, count: int) -> bytes:
    if len(content) < count:
        raise OSError(errno.EINVAL, "the file is shorter than it was when it was indexed")
    return content


def _as_os_error(error: Exception) -> OSError:
    """A driver's error as the system's: what is not plainly permanent may be tried again."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec says so of a server that fails, too
    status = getattr(error, "status", None)  # as HTTP clients name it
    if status in {404, 410}:
        return OSError(errno.ENOENT, "no such file")
    if isinstance(status, int) and 400 <= status < 500:
        number = errno.EREMOTEIO if status in _BUSY_STATUS else errno.EACCES
        return OSError(number, f"HTTP status {status}")
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, FileNotFoundError):
        return OSError(errno.ENOENT, "no such file")
    if isinstance(error, PermissionError):
        return OSError(errno.EACCES, "permission denied")
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OSError(errno.EREMOTEIO, text)
