"""`X.rejects.csv` and a run's `quarantine.csv`: inputs that are not used, each with its reason."""

import csv
import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from btpipe import artifact
from btpipe.events import Kind, Rejected

COLUMNS = ("path", "stage", "kind", "reason", "bytes", "mtime_ns")


def below(rejected: Rejected, prefix: str) -> Rejected:
    """The same seen from a folder above; absolute paths and URLs stay as they are."""
    alone = rejected.path.startswith("/") or "://" in rejected.path
    return rejected if alone else dataclasses.replace(rejected, path=prefix + rejected.path)


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
