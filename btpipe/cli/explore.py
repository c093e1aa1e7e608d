"""The commands that look for pictures in a table of vectors."""

from pathlib import Path
from typing import Annotated

import typer

from btpipe.cli.options import EXPLORE, Json, app, writable

Table = Annotated[Path, typer.Argument(help="Table of vectors.")]
Images = Annotated[
    Path | None, typer.Option(help="Folder of the pictures; where they were embedded if none.")
]
Page = Annotated[
    Path | None, typer.Option("--html", callback=writable, metavar="FILE", help="Page to write.")
]


@app.command(rich_help_panel=EXPLORE)
def search(
    vectors: Table,
    query: Annotated[str, typer.Argument(help="An image file, a path in the table, or a row.")],
    k: Annotated[int, typer.Option("-k", "--neighbours", min=1, help="How many to find.")] = 20,
    model: Annotated[
        Path | None, typer.Option(help="Bundle for an image file; found by its digest if none.")
    ] = None,
    html: Page = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Find what is most like an image, or like a row, by cosine: exact."""
    from btpipe import progress
    from btpipe.explore import search

    with progress.show("json" if as_json else "auto") as on_event:
        search.run(vectors, query, on_event, k=k, model=model, html=html, images=images)


@app.command(rich_help_panel=EXPLORE)
def dupes(
    vectors: Table,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Least cosine; if none, much nearer than all else."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=writable, help="List to write; X.dupes.csv.")
    ] = None,
    html: Page = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Find groups of one picture: copied, encoded again, resized, cropped a little."""
    from btpipe import progress
    from btpipe.explore import dupes

    with progress.show("json" if as_json else "auto") as on_event:
        dupes.run(vectors, on_event, threshold=threshold, out=out, html=html, images=images)


@app.command(rich_help_panel=EXPLORE)
def outliers(
    vectors: Table,
    k: Annotated[int, typer.Option("-k", "--neighbours", min=1, help="Nearest that count.")] = 10,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 20,
    out: Annotated[
        Path | None, typer.Option(callback=writable, help="List to write; X.outliers.csv.")
    ] = None,
    html: Page = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Find what is far from everything else: the mean distance to the nearest others."""
    from btpipe import progress
    from btpipe.explore import outliers

    with progress.show("json" if as_json else "auto") as on_event:
        outliers.run(vectors, on_event, k=k, top=top, out=out, html=html, images=images)
