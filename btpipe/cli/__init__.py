"""The commands. Each parses, calls one function and ends; heavy imports happen inside."""

from typing import Annotated

import typer

from btpipe.cli import draw, evaluate, explore, stages, tools
from btpipe.cli.options import app

__all__ = ["app", "draw", "evaluate", "explore", "stages", "tools"]


def _version(requested: bool) -> None:
    if requested:
        from btpipe import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def btpipe(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """From a folder of unlabelled images to your own encoder and a table of vectors."""
    del version
