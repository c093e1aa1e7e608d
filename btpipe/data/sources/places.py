"""Bytes of a local file or of a URL: opened, measured, read in part.

URLs (s3, gs, http, memory, ...) go through fsspec, which is imported when the first one is met.
"""

import errno
import io
import os
import re
import stat
from typing import BinaryIO, Protocol, cast

from btpipe.errors import UsageError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WHOLE_BYTES = 1 << 20
"""Remote files up to this size are fetched at once: a request costs more than the bytes."""


class Remote(Protocol):
    """The part of fsspec's file systems that is used here."""

    def info(self, path: str) -> dict[str, object]: ...
    def find(self, path: str, *, detail: bool) -> list[str]: ...
    def glob(self, path: str) -> list[str]: ...
    def open(self, path: str, mode: str) -> BinaryIO: ...
    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def unstrip_protocol(self, name: str) -> str: ...


def is_url(text: str) -> bool:
    """Whether the text is a URL (or names synthetic images) rather than a path."""
    return _URL.match(text) is not None or is_synthetic(text)


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


def measure(place: str) -> tuple[int, int]:
    """(bytes, mtime_ns) of a regular file; 0 for the time of a URL.

    Raises:
        OSError: there is none, or it is a pipe, a device or a folder.
    """
    if is_url(place):
        return _remote_bytes(place), 0
    status = os.stat(place)  # noqa: PTH116 - a million of them: half the time of a Path
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return status.st_size, status.st_mtime_ns


def _remote_bytes(url: str) -> int:
    system, path = remote(url)
    try:
        return cast(int, system.info(path)["size"] or 0)
    except Exception as error:  # every driver has its own errors
        raise _as_os_error(error) from error


def open_binary(place: str) -> BinaryIO:
    """The file, open for reading with seeks; never waits on a pipe.

    Raises:
        OSError: it cannot be read.
    """
    if not is_url(place):
        return open(place, "rb", opener=_open_now)
    size = _remote_bytes(place)
    system, path = remote(place)
    try:
        whole = size <= _WHOLE_BYTES
        return io.BytesIO(system.cat_file(path)) if whole else system.open(path, "rb")
    except Exception as error:  # every driver has its own errors
        raise _as_os_error(error) from error


def _open_now(path: str, flags: int) -> int:
    """Opens without waiting for the other end, should a pipe have taken the file's place."""
    return os.open(path, flags | os.O_NONBLOCK)


def read(place: str) -> bytes:
    """The whole content of a regular file or a URL.

    Raises:
        OSError: vanished, not permitted, no longer a regular file.
    """
    if is_url(place):
        system, path = remote(place)
        try:
            return system.cat_file(path)
        except Exception as error:  # every driver has its own errors
            raise _as_os_error(error) from error
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        _require_regular(descriptor)
        return file.readall()


def read_range(place: str, offset: int, count: int) -> bytes:
    """`count` bytes from `offset` on.

    Raises:
        OSError: as `read`, and where the file ends before that.
    """
    if is_url(place):
        system, path = remote(place)
        try:
            content = system.cat_file(path, start=offset, end=offset + count) if count else b""
        except Exception as error:  # every driver has its own errors
            raise _as_os_error(error) from error
    else:
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _require_regular(descriptor)
            content = os.pread(descriptor, count, offset)
            while 0 < len(content) < count:
                more = os.pread(descriptor, count - len(content), offset + len(content))
                if not more:
                    break
                content += more
        finally:
            os.close(descriptor)
    if len(content) != count:
        raise OSError(errno.EINVAL, "the file is shorter than it was when it was indexed")
    return content


def _require_regular(descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def _as_os_error(error: Exception) -> OSError:
    """A driver's error as the system's: what is not plainly permanent may be tried again."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, FileNotFoundError):
        return OSError(errno.ENOENT, "no such file")
    if isinstance(error, PermissionError):
        return OSError(errno.EACCES, "permission denied")
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OSError(errno.EREMOTEIO, text)
