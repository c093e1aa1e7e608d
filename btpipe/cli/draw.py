"""The commands that draw pages: plot and map."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from btpipe.cli.options import EXPLORE, JUDGE, Json, app, writable


@app.command(rich_help_panel=JUDGE)
def plot(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders; the newest if none.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=writable, help="X.html, or X.png; run.html if nothing else is asked for."
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Event files for TensorBoard: needs btpipe\\[tensorboard]."
        ),
    ] = None,
    by: Annotated[Literal["step", "epoch"], typer.Option(help="What is below.")] = "step",
    correlation: Annotated[
        str,
        typer.Option(
            metavar="STEPS",
            help="Cross-correlation matrices of these checkpoints: first,last or 0,300,900.",
        ),
    ] = "",
    live: Annotated[
        bool, typer.Option("--live", help="Until the runs end: the page shows what is new.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw where runs went: loss and floor, rates, ranks, correlations, kNN, speed."""
    from btpipe import progress
    from btpipe.export import contract
    from btpipe.plot import plot

    with progress.show("json" if as_json else "auto") as on_event:
        folders = runs or [contract.newest_run()]
        plot.make(
            folders,
            out or (None if tensorboard else Path("run.html")),
            on_event,
            tensorboard=tensorboard,
            by=by,
            correlation=correlation,
            live=live,
        )


@app.command("map", rich_help_panel=EXPLORE)
def draw_map(
    vectors: Annotated[Path, typer.Argument(help="Vectors that btpipe embed wrote.")],
    out: Annotated[Path, typer.Option(callback=writable, help="X.html.")] = Path("map.html"),
    by: Annotated[
        Literal["pca", "umap"],
        typer.Option(help="pca: at once. umap: minutes, needs btpipe\\[map]."),
    ] = "pca",
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that the pictures are below, if not the table's root."),
    ] = None,
    most: Annotated[
        int, typer.Option(min=1, help="Points; of more rows, evenly chosen.")
    ] = 100_000,
    clusters: Annotated[int, typer.Option(min=1, help="Groups that k-means finds.")] = 12,
    as_json: Json = False,
) -> None:
    """Draw vectors as a map to look around in: one page, pictures and neighbours in it."""
    from btpipe import progress
    from btpipe.explore.map import make

    with progress.show("json" if as_json else "auto") as on_event:
        make(vectors, out, on_event, by=by, most=most, clusters=clusters, images=images)
