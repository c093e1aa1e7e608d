"""What the commands share: the application, its groups, and options that several take."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

PANELS = {
    "Train": ("pretrain", "scan", "shard", "views", "plan"),
    "Publish": ("export",),
    "Embed": ("embed", "merge"),
    "Judge": ("eval", "compare", "plot"),
    "Explore": ("search", "dupes", "outliers", "map"),
    "Look after": ("doctor", "inspect", "verify", "selftest", "bench", "demo", "recipe"),
}
"""The panels of `btpipe --help` and their commands, in the order of the road."""
TRAIN, PUBLISH, EMBED, JUDGE, EXPLORE, LOOK_AFTER = PANELS


class Commands(TyperGroup):
    """The commands in the order of `PANELS`."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Their names."""
        del ctx
        return [name for names in PANELS.values() for name in names]


app = typer.Typer(
    name="btpipe",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(no_args_is_help=True, help="Recipes: show and list them.")
app.add_typer(recipe_app, name="recipe", rich_help_panel=LOOK_AFTER)
eval_app = typer.Typer(no_args_is_help=True, help="Judge vectors.")
app.add_typer(eval_app, name="eval", rich_help_panel=JUDGE)

RecipePath = Annotated[Path, typer.Argument(help="A TOML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key: --set optim.epochs=300"),
]
Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Folders of images, file lists (.txt, .csv, .parquet), tar shards, parquet with"
        " images, an index; globs, braces and URLs of these.",
    ),
]
Precisions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        help="fp32 (always), fp16, int8: several as fp32,int8. int8 is calibrated on the images.",
    ),
]
ImageColumn = Annotated[
    str, typer.Option(metavar="NAME", help="Of parquet files with images in several columns.")
]
MaxBad = Annotated[
    str, typer.Option(help="Unusable inputs allowed: a count (10) or a share (0.01).")
]
Strict = Annotated[bool, typer.Option("--strict", help="The same as --max-bad 0.")]
Json = Annotated[bool, typer.Option("--json", help="Events as JSON lines on standard output.")]


def writable(out: Path | None) -> Path | None:
    """An option that names what is to be written, if it can be."""
    if out is not None:
        from btpipe import output_path

        output_path.require_writable(out)
    return out


def budget(text: str, *, strict: bool) -> float | None:
    """`--max-bad`: "" is no bound, "10" a count, "0.01" or "1%" a share of the inputs."""
    from btpipe.errors import UsageError

    if strict:
        return 0
    if not text:
        return None
    if text.isdecimal():
        return int(text)
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"--max-bad {text}", expected="a count (10) or a share (0.01, or 1%)")
    return share


def batch_images(text: str) -> int | None:
    """`--batch-size`: None for "auto"."""
    from btpipe.errors import UsageError

    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size {text}", expected="auto, or a number from 1")
    return int(text)
