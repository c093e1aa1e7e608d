"""The commands. Each parses, calls one function and ends; heavy imports happen inside."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="btpipe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(no_args_is_help=True, help="Recipes: show and list them.")
app.add_typer(recipe_app, name="recipe")
eval_app = typer.Typer(no_args_is_help=True, help="Judge vectors.")
app.add_typer(eval_app, name="eval")
bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine.")
app.add_typer(bench_app, name="bench")

RecipePath = Annotated[Path, typer.Argument(help="A TOML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key: --set optim.epochs=300"),
]
Json = Annotated[bool, typer.Option("--json", help="Events as JSON lines on standard output.")]


def _version(asked: bool) -> None:
    if asked:
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


@app.command()
def pretrain(
    recipe: RecipePath,
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Name of the run; the recipe's name if empty.")] = "",
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    devices: Annotated[
        str, typer.Option(help="auto, or how many GPUs (or CPU processes).")
    ] = "auto",
    init_from: Annotated[
        str, typer.Option(help="Weights to start from; the same as --set network.init_from=...")
    ] = "",
    sbatch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a SLURM job file; start nothing.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines, with --sbatch.")] = 1,
    time: Annotated[str, typer.Option(help="Longest run time, with --sbatch: 1-12:00:00.")] = "",
    partition: Annotated[str, typer.Option(help="SLURM partition, with --sbatch.")] = "",
    as_json: Json = False,
) -> None:
    """Train an encoder on unlabelled images. Run again, it goes on from its last checkpoint."""
    from btpipe import recipe as recipes

    start = [f"network.init_from={json.dumps(init_from)}"] if init_from else []
    settings = [*(overrides or ()), *start]
    wanted = recipes.load(recipe, settings)
    from btpipe.pretrain import launch
    from btpipe.pretrain import sbatch as slurm

    run = runs / (name or recipe.stem)
    job = slurm.Job(nodes, devices, time, partition)
    if sbatch is not None:
        pairs = [word for setting in settings for word in ("--set", setting)]
        place = ["--name", run.name, "--runs", str(runs)]
        words = ["pretrain", str(recipe), *pairs, *place, *(["--json"] if as_json else [])]
        slurm.write(sbatch, run.name, wanted, words, job)
        typer.echo(f"{sbatch} is written: sbatch {sbatch}")
        return
    job.require_default()
    launch.pretrain(run, wanted, devices=devices, mode="json" if as_json else "auto")


@app.command()
def shard(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Images of any kind.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    size: Annotated[
        int, typer.Option(min=1, help="Pixels of the shorter side; nothing is enlarged.")
    ] = 400,
    quality: Annotated[int, typer.Option(min=1, max=95, help="Of the JPEGs.")] = 90,
    shard_bytes: Annotated[str, typer.Option(help="Most bytes in a shard.")] = "256MiB",
    as_json: Json = False,
) -> None:
    """Rewrite images as tar shards of smaller JPEGs; run again, it goes on where it was."""
    from btpipe import progress
    from btpipe.data import index, shards

    options = shards.Options(size, quality, shards.parse_bytes(shard_bytes))
    with progress.show("json" if as_json else "auto") as report:
        made, refused = index.build(inputs, report)
        shards.write(made, refused, out, options, report)


@app.command()
def export(
    run: Annotated[Path | None, typer.Argument(help="Run folder; the newest one if none.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Always written; accepted.")] = False,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="Always written; accepted.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Bundle to write; exports/NAME.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images for the check; the run's own if none.")
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="The network before training: the baseline.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another bundle of that name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a run's encoder as ONNX and safetensors, if both agree with it on real images."""
    from btpipe import progress
    from btpipe.export import bundle

    del onnx, safetensors  # a bundle always holds both
    run = run or bundle.newest_run()
    out = out or Path("exports") / (f"{run.name}-untrained" if untrained else run.name)
    with progress.show("json" if as_json else "auto") as report:
        bundle.export_run(run, out, report, untrained=untrained, images=images, overwrite=overwrite)


@app.command()
def embed(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Folders of images, file lists (.txt, .csv, .parquet), tar shards, parquet with"
            " images, an index; globs, braces and URLs of these.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Table to write: NAME.parquet.")],
    model: Annotated[Path | None, typer.Option(help="Bundle; the newest export if none.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one call of the network.")] = 32,
    max_bad: Annotated[
        str, typer.Option(help="Unreadable inputs allowed: a count (10) or a share (0.01).")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="The same as --max-bad 0.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace vectors of another bundle.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Embed every image of the inputs into a parquet table; run again, it goes on where it was."""
    from btpipe import progress
    from btpipe.embed import job
    from btpipe.export import contract

    budget = 0 if strict else _budget(max_bad)
    model = model or contract.newest_bundle()
    with progress.show("json" if as_json else "auto") as report:
        job.embed(
            source,
            out,
            model,
            report,
            batch_size=batch_size,
            max_bad=budget,
            overwrite=overwrite,
        )


@app.command()
def scan(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Folders of images, file lists (.txt, .csv, .parquet), tar shards, parquet with"
            " images, an index; globs, braces and URLs of these.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Index to write: NAME.parquet.")] = Path(
        "index.parquet"
    ),
    depth: Annotated[
        Literal["list", "header", "decode"],
        typer.Option(
            help="list: names, bytes and times; no file is opened. header: the first bytes of"
            " each file, thousands a second; pretrain does this by itself. decode: everything is"
            " read, decoded as for training and digested: about 250 photographs of 400 x 533 a"
            " second and core."
        ),
    ] = "header",
    limit: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Longest time to decode one file.")
    ] = 20.0,
    max_bad: Annotated[
        str, typer.Option(help="Unusable inputs allowed: a count (10) or a share (0.01).")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="The same as --max-bad 0.")] = False,
    as_json: Json = False,
) -> None:
    """Look at every image before training does; run again, it decodes only what changed."""
    from btpipe import progress
    from btpipe.data import scan as scanning

    budget = 0 if strict else _budget(max_bad)
    with progress.show("json" if as_json else "auto") as report:
        scanning.scan(source, out, report, depth=depth, max_bad=budget, limit_seconds=limit)


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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for all that it makes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the images and of the run.")] = 0,
    as_json: Json = False,
) -> None:
    """Walk the whole road on drawn sample images: about four minutes on two cores, offline."""
    from btpipe.road import demo as road

    road.run(out, seed=seed, mode="json" if as_json else "auto")


@bench_app.command("step")
def bench_step(
    backbone: Annotated[str, typer.Option(help="A torchvision ResNet.")] = "resnet50",
    size: Annotated[int, typer.Option(min=16, help="Pixels of a view's side.")] = 224,
    batch: Annotated[int, typer.Option(min=2, help="Pairs of views in a step.")] = 16,
    dimension: Annotated[int, typer.Option(min=2, help="Width of the projector's layers.")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Turns of each row; medians count.")] = 3,
    grid: Annotated[
        str, typer.Option(metavar="N,..xD,..", help="Batches and dimensions for the loss alone.")
    ] = "64,256,1024,2048x8192",
    loss_only: Annotated[bool, typer.Option("--loss-only", help="The loss's table alone.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compiled rows as well.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: seconds, no verdict.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the training step, loss, LARS and traffic against the published formulation."""
    from btpipe import progress
    from btpipe.road import benchmark

    sizes = benchmark.sizes(backbone, size, batch, dimension)
    asked = benchmark.options(sizes, steps=steps, grid=grid)
    options = benchmark.QUICK if quick else asked
    with progress.show("json" if as_json else "auto") as report:
        benchmark.run(options, report, compiled=compiled, loss_only=loss_only)


@bench_app.command("loader")
def bench_loader(
    data: Annotated[Path | None, typer.Option(help="Images; drawn ones if none.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Pairs of views in a batch.")] = 64,
    size: Annotated[int, typer.Option(min=16, help="Pixels of a view's side.")] = 224,
    workers: Annotated[int, typer.Option(min=1, help="Threads, or worker processes.")] = 2,
    batches: Annotated[int, typer.Option(min=1, help="Batches in a turn.")] = 6,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each row; medians count.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: seconds, no verdict.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the loader against the published transform in a DataLoader, on the same images."""
    from btpipe import progress
    from btpipe.road import bench_loader as benchmark

    asked = benchmark.Options(batch, size, workers, batches, turns)
    options = benchmark.QUICK if quick else asked
    with progress.show("json" if as_json else "auto") as report:
        benchmark.run(options, data, report)


@app.command()
def selftest(as_json: Json = False) -> None:
    """Check on this machine that loss, LARS, schedule, precisions and ranks are right."""
    from btpipe import progress
    from btpipe.road import selftest as testing

    with progress.show("json" if as_json else "auto") as report:
        testing.run(report)


@app.command()
def views(
    recipe: RecipePath,
    overrides: Overrides = None,
    data: Annotated[str, typer.Option(help="Images; the recipe's data.train if empty.")] = "",
    out: Annotated[Path, typer.Option(help="Picture to write: NAME.png.")] = Path("views.png"),
    count: Annotated[int, typer.Option(min=1, max=64, help="How many images.")] = 8,
    epoch: Annotated[int, typer.Option(min=0, help="Of which epoch.")] = 0,
    page: Annotated[
        bool, typer.Option("--html", help="NAME.html as well, with every number.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw what training sees: images, their views and the numbers behind them."""
    from btpipe import progress
    from btpipe import recipe as recipes
    from btpipe.road import views_sheet

    source = [f"data.train={json.dumps(data)}"] if data else []
    wanted = recipes.load(recipe, [*(overrides or ()), *source])
    with progress.show("json" if as_json else "auto") as report:
        views_sheet.make(wanted, recipe.stem, out, report, count=count, epoch=epoch, page=page)


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


def _budget(text: str) -> float | None:
    """`--max-bad`: "" is no bound, "10" a count, "0.01" or "1%" a share of the inputs."""
    from btpipe.errors import UsageError

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
