"""The commands that say what vectors are worth."""

from pathlib import Path
from typing import Annotated

import typer

from btpipe.cli.options import Json, app, eval_app


@eval_app.command("knn")
def eval_knn(
    vectors: Annotated[Path, typer.Argument(help="Table whose rows are the neighbours.")],
    test: Annotated[Path, typer.Option(help="Table whose rows are judged.")],
    k: Annotated[int, typer.Option("-k", "--neighbours", min=1, help="Neighbours that vote.")] = 20,
    as_json: Json = False,
) -> None:
    """Judge vectors by how many test images their nearest neighbours name rightly."""
    from btpipe import progress
    from btpipe.explore import knn

    with progress.show("json" if as_json else "auto") as report:
        report(knn.evaluate(vectors, test, k).table())


@app.command()
def compare(
    test: Annotated[Path, typer.Option(help="Labelled images that the run has not seen.")],
    run: Annotated[Path | None, typer.Argument(help="Run folder; the newest one if none.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to keep; RUN/compare.")] = None,
    k: Annotated[int, typer.Option("-k", "--neighbours", min=1, help="Neighbours that vote.")] = 20,
    as_json: Json = False,
) -> None:
    """Judge a run's encoder against its untrained twin and raw pixels, on labelled images."""
    from btpipe import progress
    from btpipe.export import contract
    from btpipe.road import compare as comparing

    run = run or contract.newest_run()
    with progress.show("json" if as_json else "auto") as report:
        judged = comparing.compare(run, test, out or run / "compare", report, k=k)
        report(judged.table(f"Nearest-neighbour accuracy, {run}"))
