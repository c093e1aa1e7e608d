"""The commands that concern the whole road: demo, bench, views, inspect, verify and others."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from btpipe.cli.options import (
    LOOK_AFTER,
    TRAIN,
    Json,
    Overrides,
    RecipePath,
    app,
    recipe_app,
    writable,
)


@app.command(rich_help_panel=LOOK_AFTER)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for all that it makes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the images and of the run.")] = 0,
    as_json: Json = False,
) -> None:
    """Walk the whole road on drawn sample images: about four minutes on two cores, offline."""
    from btpipe.tools import demo

    demo.run(out, seed=seed, mode="json" if as_json else "auto")


@app.command(rich_help_panel=LOOK_AFTER)
def bench(
    data: Annotated[Path | None, typer.Option(help="Images; drawn ones if none.")] = None,
    model: Annotated[Path | None, typer.Option(help="Bundle; a random network if none.")] = None,
    images: Annotated[
        int | None, typer.Option(min=2, help="Images in a turn; 64, or 4096 on a GPU.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each row; medians count.")] = 3,
    backbone: Annotated[str, typer.Option(help="Of the random network.")] = "resnet50",
    size: Annotated[int, typer.Option(min=16, help="Its pixels of a side.")] = 224,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Which to measure; auto: a GPU if any.")
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: seconds, no verdict.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure how fast this machine embeds, and whether decoding or the network is the limit."""
    from btpipe import progress
    from btpipe.tools import bench

    options = bench.options(images, turns, backbone, size, device=device, quick=quick)
    with progress.show("json" if as_json else "auto") as on_event:
        bench.run(options, data, model, on_event)


@app.command(rich_help_panel=LOOK_AFTER)
def selftest(as_json: Json = False) -> None:
    """Check on this machine that loss, LARS, schedule, precisions and ranks are right."""
    from btpipe import progress
    from btpipe.tools import selftest

    with progress.show("json" if as_json else "auto") as on_event:
        selftest.run(on_event)


@app.command("inspect", rich_help_panel=LOOK_AFTER)
def inspect_artifact(
    path: Annotated[Path, typer.Argument(help="A run, bundle, index, table, ... or a file of it.")],
    as_json: Json = False,
) -> None:
    """Say what a thing is, what made it, and the chain back to its recipe and data."""
    from btpipe import progress
    from btpipe.tools import inspect

    with progress.show("json" if as_json else "auto") as on_event:
        on_event(inspect.inspect(path))


@app.command(rich_help_panel=LOOK_AFTER)
def verify(
    path: Annotated[Path, typer.Argument(help="A run, bundle, index, table, ... or a file of it.")],
    as_json: Json = False,
) -> None:
    """Check every sha256, page and account of a thing; exit code 4 names what changed."""
    from btpipe import progress
    from btpipe.tools import verify

    with progress.show("json" if as_json else "auto") as on_event:
        verify.verify(path, on_event)


@app.command(rich_help_panel=TRAIN)
def views(
    recipe: RecipePath,
    overrides: Overrides = None,
    data: Annotated[str, typer.Option(help="Images; the recipe's data.train if empty.")] = "",
    out: Annotated[
        Path, typer.Option(callback=writable, help="Picture to write: NAME.png.")
    ] = Path("views.png"),
    count: Annotated[int, typer.Option(min=1, max=64, help="How many images.")] = 8,
    epoch: Annotated[int, typer.Option(min=0, help="Of which epoch.")] = 0,
    page: Annotated[
        bool, typer.Option("--html", help="NAME.html as well, with every number.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw what training sees: images, their views and the numbers behind them."""
    from btpipe import progress
    from btpipe.preview import sheet
    from btpipe.recipe import load

    source = [f"data.train={json.dumps(data)}"] if data else []
    described = load(recipe, [*(overrides or ()), *source])
    with progress.show("json" if as_json else "auto") as on_event:
        sheet.make(described, recipe.stem, out, on_event, count=count, epoch=epoch, page=page)


@recipe_app.command("show")
def recipe_show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print a recipe with everything it extends, every default and every --set resolved."""
    from btpipe.recipe import load

    typer.echo(load(recipe, overrides or ()).to_toml())


@recipe_app.command("list")
def recipe_list() -> None:
    """Print the recipes that ship with btpipe."""
    from btpipe.recipe import shipped

    for path in shipped():
        typer.echo(path.name)


@app.command(rich_help_panel=LOOK_AFTER)
def doctor(
    model: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Embed this bundle's golden images here, too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at this machine: what btpipe needs is there, or what to type."""
    from btpipe import progress
    from btpipe.tools import doctor

    with progress.show("json" if as_json else "auto") as on_event:
        doctor.run(on_event, Path(), model)


@app.command(rich_help_panel=TRAIN)
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    data: Annotated[str, typer.Option(help="Images; the recipe's data.train if empty.")] = "",
    devices: Annotated[
        str, typer.Option(help="auto, or how many GPUs (or CPU processes) the run will have.")
    ] = "auto",
    write: Annotated[
        Path | None,
        typer.Option(callback=writable, metavar="FILE", help="Write what is advised as a recipe."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for a minute what a run of a recipe will cost here: hours, memory, disk, what binds."""
    from btpipe import progress, runtime
    from btpipe.recipe import load
    from btpipe.tools import plan

    source = [f"data.train={json.dumps(data)}"] if data else []
    described = load(recipe, [*(overrides or ()), *source])
    with progress.show("json" if as_json else "auto") as on_event:
        plan.run(described, recipe.stem, on_event, devices=runtime.devices(devices), write=write)
