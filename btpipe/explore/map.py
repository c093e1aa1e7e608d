"""`btpipe map`: all vectors of a table as points of one page, to look around in."""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import numpy as np

from btpipe.embed import table
from btpipe.errors import UsageError
from btpipe.events import Finished, Note, Report, Warned
from btpipe.explore import blocks, layout, map_page, tables
from btpipe.explore.map_page import Points
from btpipe.explore.pictures import Pictures
from btpipe.explore.tables import Vectors
from btpipe.pages import thumbnails

By = Literal["pca", "umap"]
NEIGHBOURS = 10
MOST_POINTS = 100_000
CLUSTERS = 12
CLUSTER_DIMENSIONS = 32
"""Principal components that clusters are found in: the others are mostly noise."""


@dataclasses.dataclass(frozen=True)
class Mapped(Finished):
    """A page of `points` of the `rows` of a table, evenly chosen, with `pictures` in it."""

    job = "map"

    out: Path
    points: int
    rows: int
    pictures: int
    bytes: int

    @property
    def text(self) -> str:
        chosen = f", evenly chosen of {self.rows:,}" if self.points < self.rows else ""
        size = f"{self.bytes / 1e6:.1f} MB"
        return (
            f"{self.out}: {self.points:,} points{chosen}, {self.pictures:,} pictures in it, {size}"
        )


def make(
    vectors: Path,
    out: Path,
    on_event: Report,
    *,
    by: By = "pca",
    most: int = MOST_POINTS,
    clusters: int = CLUSTERS,
    images: Path | None = None,
) -> None:
    """Writes the page. `images` is the folder that the pictures are below, if not the table's root.

    Raises:
        UsageError: no table there, no vectors in it, a name that is not X.html; or UMAP is asked
            for and not installed.
        IntegrityError: the table is damaged.
        MachineError: no space, or no permission.
    """
    started = time.monotonic()
    if out.suffix.lower() != ".html":
        raise UsageError(f"--out {out}", expected="a name that ends in .html")
    opened = tables.open_vectors(vectors, on_event)
    rows = len(opened)
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64))
    sample = opened.take(chosen) if len(chosen) < rows else opened
    pictures = Pictures(sample, images)
    small = thumbnails.make(len(sample), pictures.content, on_event)
    root = images or sample.footer.get(table.ROOT, "")
    if not small:
        reason = f"they are not below {root}" if str(root) else "the table names no folder"
        on_event(Warned(f"no pictures: {reason}; name theirs: --images DIR"))
    points = _points(sample, by, clusters, small, on_event)
    map_page.write(out, vectors.name, dataclasses.replace(points, rows=rows, root=_address(root)))
    seconds, size = time.monotonic() - started, out.stat().st_size
    on_event(Mapped(seconds, out, len(sample), rows, len(small), size))


def _address(folder: str | Path) -> str:
    """The address of the folder that the rows' files are below; "" where it is not here."""
    return Path(folder).absolute().as_uri() if str(folder) and Path(folder).is_dir() else ""


def _points(
    vectors: Vectors, by: By, clusters: int, small: dict[int, str], on_event: Report
) -> Points:
    reduced = layout.principal(vectors.unit, CLUSTER_DIMENSIONS)
    places = {"pca": reduced[:, :2]}
    if by == "umap":
        on_event(Note("UMAP takes about a minute for 10,000 vectors; --by pca is there at once"))
        places = {"umap": layout.umap(vectors.unit), **places}
    text = f"finding the {NEIGHBOURS} nearest of each of {len(vectors):,} vectors"
    on_event(Note(text, {"neighbours": NEIGHBOURS, "vectors": len(vectors)}))
    nearest, cosines = blocks.nearest_others(vectors.unit, NEIGHBOURS)
    return Points(
        paths=[path or "" for path in vectors.column("path")],
        labels=[label or "" for label in vectors.column("label")],
        clusters=layout.clusters(reduced, clusters),
        places=places,
        nearest=nearest,
        cosines=cosines,
        root="",
        thumbnails=small,
        rows=len(vectors),
    )
