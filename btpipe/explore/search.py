"""What in a table looks most like a picture, or like one of the table's own rows: exact."""

import dataclasses
import time
from pathlib import Path
from typing import cast

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from btpipe import artifact, neighbours
from btpipe.embed import precisions
from btpipe.errors import BtpipeError, RefusedError, UsageError
from btpipe.events import Finished, Report, TextTable
from btpipe.explore import blocks, tables
from btpipe.explore.pictures import Pictures
from btpipe.explore.tables import Vectors
from btpipe.export import contract
from btpipe.pages import frame


@dataclasses.dataclass(frozen=True)
class NearestRows:
    """The rows most like the query, the nearest first, with their cosines; (k,) each.

    `row` is the query's own row, which is not among them; None where it is a picture.
    """

    rows: NDArray[np.int64]
    cosines: NDArray[np.float32]
    row: int | None


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A row of a table, and its cosine to what was asked for."""

    row: int
    cosine: float
    path: str
    label: str


@dataclasses.dataclass(frozen=True)
class Searched(Finished):
    """The rows of `table` most like `query`, the nearest first; `vectors` were compared."""

    job = "search"

    table: Path
    query: str
    vectors: int
    neighbours: tuple[Neighbour, ...]
    page: Path | None

    @property
    def text(self) -> str:
        if self.page:
            return f"{self.page}: {len(self.neighbours)} pictures"
        return f"{self.vectors:,} vectors compared"

    def tables(self) -> list[TextTable]:
        """A row for each."""
        rows = tuple((f"{n.cosine:.4f}", n.path, n.label, str(n.row)) for n in self.neighbours)
        columns = ("cosine", "path", "label", "row")
        return [TextTable(f"Most like {self.query}", columns, rows)]


def run(
    path: Path,
    query: str,
    on_event: Report,
    *,
    k: int = 20,
    model: Path | None = None,
    html: Path | None = None,
    images: Path | None = None,
) -> NearestRows:
    """Reports the k rows of a table that are most like `query`, and writes a page if asked.

    `query`: an image file, which is embedded with `model`, by default the bundle in exports/ that
    made the table; the number of a row; or a path as it stands in the table.

    Raises:
        UsageError: no such table, row or file; or no bundle with the digest that the table names.
        RefusedError: `model` is another bundle.
        IntegrityError: not a table of vectors, or a damaged bundle.
    """
    started = time.monotonic()
    vectors = tables.open_vectors(path, on_event)
    row = row_of(vectors, query)
    queries = (
        _embed(vectors, Path(query), model) if row is None else blocks.widen(vectors.unit[[row]])
    )
    rows, cosines = blocks.nearest(queries, vectors.unit, k if row is None else k + 1)
    others = np.flatnonzero(rows[0] != (-1 if row is None else row))[:k]
    nearest = NearestRows(rows[0][others], cosines[0][others], row)
    neighbours = tuple(
        Neighbour(at, cosine, vectors.text("path", at), vectors.text("label", at))
        for at, cosine in zip(nearest.rows.tolist(), nearest.cosines.tolist(), strict=True)
    )
    if html:
        _page(html, vectors, query, nearest, images)
    seconds = time.monotonic() - started
    on_event(Searched(seconds, vectors.path, query, len(vectors), neighbours, html))
    return nearest


def row_of(vectors: Vectors, query: str) -> int | None:
    """The row that the query names by its path or number; None where it is a file to be embedded.

    Raises:
        UsageError: no such row, and no such file.
    """
    if Path(query).is_file():
        return None
    if query.isdecimal() and int(query) < len(vectors):
        return int(query)
    row = int(vectors.rows["path"].index(query).as_py())
    if row >= 0:
        return row
    raise UsageError(
        f"no row or image {query!r}",
        where=vectors.path,
        expected=f"an image file, a row from 0 to {len(vectors) - 1:,}, or a path in the table",
    )


def _embed(vectors: Vectors, image: Path, model: Path | None) -> NDArray[np.float32]:
    """The picture's vector (1, D), made as the table's were."""
    digest = tables.bundle_of(vectors)
    bundle = model or _bundle(digest, vectors)
    model_digest = contract.open_bundle(bundle).digest if bundle.is_dir() else digest
    if model_digest != digest:
        raise RefusedError(
            f"bundle {model_digest[:12]}",
            where=bundle,
            expected=f"{digest[:12]}, which made {vectors.path}",
            fix="name that bundle with --model, or embed the table again",
        )
    # Here and not above: the network's engine takes a second that a search by row need not wait.
    from btpipe.embed import encoder  # noqa: PLC0415

    footer = vectors.footer
    config = precisions.EncoderConfig(
        bundle,
        engine=cast(precisions.Engine, footer["btpipe.engine"]),
        precision=cast(precisions.RequestedPrecision, footer["btpipe.precision"]),
        layer=cast(precisions.Layer, footer["btpipe.layer"]),
    )
    return neighbours.normalize(encoder.Encoder(config).embed([image]))


def _bundle(digest: str, vectors: Vectors) -> Path:
    """The bundle of this digest in exports/ or beside the table."""
    for folder in (Path("exports"), vectors.path.absolute().parent / "exports"):
        for manifest in sorted(folder.glob(f"*/{artifact.MANIFEST}")):
            try:
                if artifact.read(manifest.parent, contract.KIND).digest == digest:
                    return manifest.parent
            except BtpipeError:
                continue
    raise UsageError(
        f"no bundle {digest[:12]} in exports/",
        where=vectors.path,
        fix="name the bundle that made the table: --model BUNDLE",
    )


def _page(
    out: Path, vectors: Vectors, query: str, nearest: NearestRows, images: Path | None
) -> None:
    pictures = Pictures(vectors, images)
    if nearest.row is None:
        source = _query_thumbnail(Path(query))
        first = (
            f'<figure><div class="picture"><img alt="query" src="{source}"></div>'
            f"<figcaption>{frame.text(query)}</figcaption></figure>"
        )
    else:
        first = pictures.figure(nearest.row, [frame.text(query)])
    figures = [
        pictures.figure(row, [f'<span class="number">{cosine:.3f}</span>', *named(vectors, row)])
        for row, cosine in zip(nearest.rows.tolist(), nearest.cosines.tolist(), strict=True)
    ]
    about = f"{len(vectors):,} vectors of {vectors.path}, by cosine, the nearest first."
    body = (
        f'<h2>Asked for</h2><div class="gallery asked">{first}</div>'
        f'<h2>Neighbours</h2><div class="gallery">{"".join(figures)}</div>'
        f'<p class="muted">{frame.text(pictures.note())}</p>'
    )
    style = "h2 { margin: 0 0 10px; } .asked { margin-bottom: 24px; }"
    frame.write(out, f"Most like {query}", about, body, style=style)


def _query_thumbnail(image: Path) -> str:
    """The picture that was asked for."""
    with PIL.Image.open(image) as picture:
        return frame.embedded(frame.thumbnail(PIL.ImageOps.exif_transpose(picture)))


def named(vectors: Vectors, row: int) -> list[str]:
    """Label and path of a row as lines of HTML."""
    label = vectors.text("label", row)
    lines = [frame.text(label)] if label else []
    return [*lines, f'<span class="muted">{frame.text(vectors.text("path", row))}</span>']
