"""`X.findings.csv`: usable images that deserve a look, duplicates and nearly empty ones."""

import collections
import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from btpipe import artifact
from btpipe.data.file_checks import examples

COLUMNS = ("path", "kind", "detail")
FLAT, FEW, DUPLICATE = "one colour", "few bytes", "duplicate"
FEW_BYTES = 0.02
"""Bytes for a pixel; a photograph at JPEG's quality 30 has three times as many."""


@dataclasses.dataclass(frozen=True)
class ImageFinding:
    """A usable image that deserves a look: what it is, and more about it."""

    path: str
    kind: str
    detail: str


def path_beside(index: Path) -> Path:
    """The findings of a scan: `index.parquet` -> `index.findings.csv`."""
    return index.with_suffix(".findings.csv")


def read(path: Path) -> list[ImageFinding]:
    """What `write` wrote; nothing where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            ImageFinding(row["path"], row["kind"], row["detail"]) for row in csv.DictReader(file)
        ]


def write(path: Path, findings: Iterable[ImageFinding]) -> None:
    """Puts the findings under `path`, whole or not at all.

    Raises:
        MachineError: no space, or no permission.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows((finding.path, finding.kind, finding.detail) for finding in findings)
    artifact.write_file(path, text.getvalue().encode())


def of(flat: Iterable[str], table: pa.Table) -> list[ImageFinding]:
    """All findings about an index's table; `flat` are the paths of pictures of one colour."""
    plain = [ImageFinding(path, FLAT, "hardly a pixel differs from the others") for path in flat]
    flat_paths = {finding.path for finding in plain}
    few = [finding for finding in nearly_empty(table) if finding.path not in flat_paths]
    return [*duplicates(table), *plain, *few]


def duplicates(table: pa.Table) -> Iterator[ImageFinding]:
    """Rows whose content, by digest, an earlier row has."""
    counted = pc.value_counts(table["digest"].drop_null())
    repeated = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    rows = table.filter(pc.is_in(table["digest"], repeated)).select(["path", "digest"])
    first: dict[str, str] = {}
    for row in rows.to_pylist():
        path = first.setdefault(row["digest"], row["path"])
        if path != row["path"]:
            yield ImageFinding(row["path"], DUPLICATE, f"the same bytes as {path}")


def nearly_empty(table: pa.Table) -> Iterator[ImageFinding]:
    """Rows whose file is too small to show much at its size."""
    width, height, size = (np.array(table[name]) for name in ("width", "height", "bytes"))
    for row in np.flatnonzero(size < FEW_BYTES * width.astype(np.float64) * height).tolist():
        detail = f"{size[row]} bytes for {width[row]} x {height[row]} pixels"
        yield ImageFinding(table["path"][row].as_py(), FEW, detail)


@dataclasses.dataclass(frozen=True)
class FoundAlike:
    """`images` of which one thing was found, and the first few."""

    finding: str
    images: int
    examples: str


def summary(findings: Iterable[ImageFinding]) -> list[FoundAlike]:
    """The findings by their kind, the most frequent first."""
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for finding in findings:
        kinds[finding.kind].append(finding.path)
    ordered = sorted(kinds.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return [FoundAlike(kind, len(paths), examples(paths)) for kind, paths in ordered]
