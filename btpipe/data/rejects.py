"""Inputs that cannot be used, each with its kind and reason; the CSV files that list them."""

import csv
import dataclasses
import errno
import io
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from btpipe import artifact
from btpipe.errors import BtpipeError, MachineError, Stopped, UsageError
from btpipe.events import Kind, Rejected

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})
_CONTENT = frozenset(
    {None, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
)
"""What an operating system says of something that is no plain file; Arrow says None of damage."""
COLUMNS = ("path", "stage", "kind", "reason", "bytes", "mtime_ns")


class BadInputError(Exception):
    """An input that cannot be used, and why; whoever knows its path makes a `Rejected` of it."""

    def __init__(self, reason: str, kind: Kind = "content") -> None:
        super().__init__(reason, kind)
        self.reason, self.kind = reason, kind

    def __str__(self) -> str:
        return self.reason


class UnreadableError(BadInputError):
    """The content could not be had as it was listed: it may be there another time."""


def unreadable(error: OSError) -> UnreadableError:
    """Why a file cannot be read: it is gone, it is no file, or the machine failed."""
    kind: Kind = "machine"
    if isinstance(error, FileNotFoundError) or error.errno in _GONE:
        kind = "gone"
    elif error.errno in _CONTENT and not isinstance(error, TimeoutError | ConnectionError):
        kind = "content"
    return UnreadableError(f"cannot be read: {reason_of(error)}", kind)


def reason_of(error: Exception) -> str:
    """What a system says, without the number and the path that Python adds."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def unusable(error: OSError, where: str) -> BtpipeError:
    """What ends a command whose input as a whole cannot be read."""
    bad = unreadable(error)
    if bad.kind != "machine":
        return UsageError(bad.reason, where=where)
    return MachineError(bad.reason, where=where, fix="see that it can be read, and start again")


def is_machine(error: Exception) -> bool:
    """Whether the disk or the network failed, and nothing is known of the file."""
    if isinstance(error, OSError):
        return unreadable(error).kind == "machine"
    return isinstance(error, MachineError | Stopped)


def below(rejected: Rejected, prefix: str) -> Rejected:
    """The same seen from a folder above; absolute paths and URLs stay as they are."""
    is_absolute = rejected.path.startswith("/") or "://" in rejected.path
    return rejected if is_absolute else dataclasses.replace(rejected, path=prefix + rejected.path)


def path_beside(index: Path) -> Path:
    """The rejects of a scan: `index.parquet` -> `index.rejects.csv`."""
    return index.with_suffix(".rejects.csv")


def read(path: Path) -> list[Rejected]:
    """What `write` wrote; nothing where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Rejected(
                row["path"],
                row["stage"],
                cast(Kind, row["kind"]),
                row["reason"],
                int(row["bytes"]),
                int(row["mtime_ns"]),
            )
            for row in csv.DictReader(file)
        ]


def write(path: Path, rejects: Iterable[Rejected]) -> None:
    """Puts the rejects under `path`, whole or not at all.

    Raises:
        MachineError: no space, or no permission.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([getattr(each, name) for name in COLUMNS] for each in rejects)
    artifact.write_file(path, text.getvalue().encode())
