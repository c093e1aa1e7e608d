"""Rows that are far from everything else: the mean cosine distance to the k nearest other rows."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from btpipe.events import Finished, Report, TextTable
from btpipe.explore import blocks, tables
from btpipe.explore.pictures import Pictures
from btpipe.explore.search import named
from btpipe.explore.tables import Vectors
from btpipe.pages import frame

MEANING = (
    "Far from its nearest neighbours means unlike the rest to this encoder: rare subjects, other"
    " sources, damaged, empty or rotated pictures. It does not mean wrong, and a wrong picture that"
    " has many like it is not found."
)


@dataclasses.dataclass(frozen=True)
class Strange:
    """Every row, the strangest first, with its mean distance (n,) and its nearest other row."""

    rows: NDArray[np.int64]
    distance: NDArray[np.float32]
    nearest: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Outlier:
    """A row of a table, and its mean distance to its nearest others."""

    row: int
    distance: float
    path: str
    label: str


@dataclasses.dataclass(frozen=True)
class OutliersFound(Finished):
    """All `pictures` of `table` are in the list `out`, by distance to their `k` nearest.

    `strangest` are the first of them.
    """

    job = "outliers"

    table: Path
    out: Path
    page: Path | None
    pictures: int
    k: int
    strangest: tuple[Outlier, ...]

    @property
    def text(self) -> str:
        files = f"{self.out} and {self.page}" if self.page else f"{self.out}"
        return f"{files}: {self.pictures:,} pictures, the strangest first"

    def tables(self) -> list[TextTable]:
        """A row for each of the strangest."""
        rows = tuple((f"{o.distance:.4f}", o.path, o.label, str(o.row)) for o in self.strangest)
        title = f"Farthest from their {self.k} nearest, {self.table}"
        return [TextTable(title, ("distance", "path", "label", "row"), rows, MEANING)]


def run(
    path: Path,
    on_event: Report,
    *,
    k: int = 10,
    top: int = 20,
    out: Path | None = None,
    html: Path | None = None,
    images: Path | None = None,
) -> Strange:
    """Writes all rows by strangeness as a list, reports the first `top`, and a page if asked.

    Raises:
        UsageError: no such table, or `out` with another ending.
        IntegrityError: not a table of vectors.
        MachineError: no space, or no permission.
    """
    started = time.monotonic()
    out = out or tables.list_path(path, "outliers")
    tables.check_list(out)
    vectors = tables.open_vectors(path, on_event)
    ranking = rank(vectors, k)
    tables.write_list(out, _list(vectors, ranking))
    if html:
        _page(html, vectors, ranking, top, k, images)
    strangest = tuple(
        Outlier(row, distance, vectors.text("path", row), vectors.text("label", row))
        for row, distance in zip(
            ranking.rows[:top].tolist(), ranking.distance.tolist(), strict=False
        )
    )
    seconds = time.monotonic() - started
    on_event(OutliersFound(seconds, vectors.path, out, html, len(vectors), k, strangest))
    return ranking


def rank(vectors: Vectors, k: int) -> Strange:
    """All rows by falling mean distance to their k nearest others; a lone row has none, 0."""
    indices, cosines = blocks.nearest_others(vectors.unit, k)
    away = tables.distances(cosines)
    mean = away.mean(axis=1) if away.shape[1] else np.zeros(len(vectors), np.float32)
    order = np.argsort(-mean, kind="stable")
    nearest = indices[:, 0] if indices.shape[1] else np.full(len(vectors), -1)
    return Strange(order, mean[order], nearest[order])


def _list(vectors: Vectors, ranking: Strange) -> pa.Table:
    paths, labels = vectors.column("path"), vectors.column("label")
    nearest = [paths[row] if row >= 0 else None for row in ranking.nearest.tolist()]
    rows = ranking.rows.tolist()
    return pa.table(
        {
            "path": pa.array([paths[row] for row in rows], pa.string()),
            "label": pa.array([labels[row] for row in rows], pa.string()),
            "distance": ranking.distance,
            "nearest": pa.array(nearest, pa.string()),
        }
    )


def _page(
    out: Path, vectors: Vectors, ranking: Strange, top: int, k: int, images: Path | None
) -> None:
    pictures = Pictures(vectors, images)
    figures = "".join(
        pictures.figure(row, [f'<span class="number">{distance:.3f}</span>', *named(vectors, row)])
        for row, distance in zip(
            ranking.rows[:top].tolist(), ranking.distance.tolist(), strict=False
        )
    )
    median = float(np.median(ranking.distance))
    about = (
        f"The {min(top, len(vectors)):,} of {len(vectors):,} pictures of {vectors.path} with the"
        f" largest mean cosine distance to their {k} nearest (median {median:.3f}). {MEANING}"
    )
    note = f'<p class="muted">{frame.text(pictures.note())}</p>'
    frame.write(out, "Strangest pictures", about, f'<div class="gallery">{figures}</div>{note}')
