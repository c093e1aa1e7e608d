"""The commands. Each parses, calls one function and ends; heavy imports happen inside."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="btpipe",
    help="From a folder of unlabelled images to your own encoder and a table of vectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(no_args_is_help=True, help="Recipes: show and list them.")
app.add_typer(recipe_app, name="recipe")

RecipePath = Annotated[Path, typer.Argument(help="A TOML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key: --set optim.epochs=300"),
]
Json = Annotated[bool, typer.Option("--json", help="Events as JSON lines on standard output.")]


@app.command()
def pretrain(
    recipe: RecipePath,
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Name of the run; the recipe's name if empty.")] = "",
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    devices: Annotated[
        str, typer.Option(help="auto, or how many GPUs (or CPU processes).")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Train an encoder on unlabelled images. Run again, it goes on from its last checkpoint."""
    from btpipe import recipe as recipes

    wanted = recipes.load(recipe, overrides or ())
    from btpipe.pretrain import launch

    run = runs / (name or recipe.stem)
    launch.pretrain(run, wanted, devices=devices, mode="json" if as_json else "auto")


@recipe_app.command("show")
def recipe_show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print a recipe with everything it extends, every default and every --set resolved."""
    from btpipe import recipe as recipes

    typer.echo(recipes.load(recipe, overrides or ()).to_toml())


@recipe_app.command("list")
def recipe_list() -> None:
    """Print the recipes that ship with btpipe."""
    from btpipe import recipe as recipes

    for path in recipes.shipped():
        typer.echo(path.name)
