"""`X.rejects.csv` and a run's `quarantine.csv`: inputs that are not used, each with its reason."""

import csv
import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path

from btpipe import artifact
from btpipe.events import FileRejected

COLUMNS = ("path", "stage", "reason", "bytes", "mtime_ns")
"""The last two say which content it was; a quarantine.csv may go without them."""


@dataclasses.dataclass(frozen=True)
class Reject:
    """An input that is not used; `bytes` and `mtime_ns` are -1 where it is to be tried again."""

    path: str
    stage: str
    reason: str
    bytes: int = -1
    mtime_ns: int = -1

    @property
    def event(self) -> FileRejected:
        return FileRejected(self.path, self.stage, self.reason)

    def below(self, prefix: str) -> "Reject":
        """The same seen from a folder above; absolute paths and URLs stay as they are."""
        alone = self.path.startswith("/") or "://" in self.path
        return self if alone else dataclasses.replace(self, path=prefix + self.path)


def path_beside(index: Path) -> Path:
    """The rejects of a scan: `index.parquet` -> `index.rejects.csv`."""
    return index.with_suffix(".rejects.csv")


def read(path: Path) -> list[Reject]:
    """What `write` wrote; nothing where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Reject(
                row["path"],
                row["stage"],
                row["reason"],
                int(row.get("bytes") or -1),
                int(row.get("mtime_ns") or -1),
            )
            for row in csv.DictReader(file)
        ]


def write(path: Path, rejects: Iterable[Reject]) -> None:
    """Puts the rejects under `path`, whole or not at all.

    Raises:
        MachineError: no space, or no permission.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for reject in rejects:
        known = reject.mtime_ns >= 0
        stamp = (reject.bytes, reject.mtime_ns) if known else ("", "")
        writer.writerow((reject.path, reject.stage, reject.reason, *stamp))
    artifact.write_file(path, text.getvalue().encode())
